"""One running process: configuration, transport, services, compute, the span of a model and its caches."""
