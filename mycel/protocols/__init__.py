"""What is said, in which order: ids, errors, ports, messages, codec and one state machine per conversation."""
