"""The second engine, hivemind: its Go libp2p daemon as a transport, and its DHT as a record store.

`p2pd_transport` speaks to the daemon over its sockets and imports nothing of hivemind. `record_store` speaks to
`dht_process`, a process of its own and the one file that imports hivemind: no process can hold it beside libp2p. So
this package imports nothing by itself.

Ring: shell (a package: what it holds decides).
"""
