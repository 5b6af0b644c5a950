//! The controllers themselves; answered by whichever node is asked.

use std::sync::Arc;

use pageport_proto::v1;
use pageport_proto::v1::cluster_service_server::ClusterService;
use tonic::{Request, Response, Status};

use crate::config::Member;
use crate::consensus::Consensus;

/// Tells where this node stands.
#[derive(Debug, Clone)]
pub struct Cluster {
    consensus: Consensus,
    members: Arc<Vec<Member>>,
}

impl Cluster {
    /// Of these members.
    pub fn new(consensus: Consensus, members: Arc<Vec<Member>>) -> Self {
        Self { consensus, members }
    }
}

#[tonic::async_trait]
impl ClusterService for Cluster {
    async fn get_cluster_status(
        &self,
        _: Request<v1::GetClusterStatusRequest>,
    ) -> Result<Response<v1::GetClusterStatusResponse>, Status> {
        let status = self.consensus.status();
        let members = self.members.iter().map(|member| v1::ClusterMember {
            id: member.id,
            site: member.site.to_string(),
            address: member.address.clone(),
            leader: status.leader == Some(member.id),
        });
        Ok(Response::new(v1::GetClusterStatusResponse {
            members: members.collect(),
            term: status.term,
            committed_index: status.committed,
            applied_index: status.applied,
            answered_by: status.id,
        }))
    }
}
