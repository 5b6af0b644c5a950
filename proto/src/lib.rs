//! The Pageport API: types and services generated from `proto/`, and typed ids.
//!
//! This crate holds no behaviour beyond parsing: what a message means is decided by who receives it.

mod finding;
pub mod ids;
pub mod ownership;

/// Generated from `proto/pageport/v1/*.proto`; the comments there are the documentation.
#[allow(missing_docs, clippy::all)]
pub mod v1 {
    tonic::include_proto!("pageport.v1");
}

/// The compiled description of `proto/`, as a serialised `FileDescriptorSet`.
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/pageport.v1.bin"));

pub use ids::{MigrationId, RequestId, RestorationId, SiteName, StoreId, VmId, WorkerName};
