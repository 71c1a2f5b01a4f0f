//! Namespaces, ids, filters: the walls around a worker.
