//! What every Pageport daemon shares: configuration, tracing, TLS identities, the durable store.
