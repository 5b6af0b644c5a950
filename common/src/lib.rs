//! What every Pageport daemon and tool shares, so that it is written once:
//!
//! | module | what |
//! |---|---|
//! | [`config`] | TOML file to typed struct, errors that name the file and the key |
//! | [`telemetry`] | structured logs, OTLP export, trace context in and out of gRPC metadata |
//! | [`tls`] | one identity per process; mutual TLS settings for gRPC and QUIC |
//! | [`error`] | an error and its causes in one line |
//! | [`backup`] | the file of a backup, and its way over a connection |
//! | [`store`] | the durable key-value store: sled with a real `fsync` |
//!
//! Nothing here knows what a VM is.

pub mod backup;
pub mod config;
pub mod error;
pub mod store;
pub mod telemetry;
pub mod tls;
