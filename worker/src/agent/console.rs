//! What operators ask of this worker over mTLS gRPC: a VM's serial console, and to read a recovery point.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use futures::{Stream, StreamExt};
use pageport_common::tls::Identity;
use pageport_proto::VmId;
use pageport_proto::v1::host_service_server::{HostService, HostServiceServer};
use pageport_proto::v1::{
    ClosePointRequest, ClosePointResponse, ConsoleInput, ConsoleOutput, OpenPointRequest, OpenPointResponse,
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Server;
use tonic::{Request, Response, Status, Streaming};

use super::drills;
use crate::node::Node;

const FIRST_INPUT_LIMIT: Duration = Duration::from_secs(10);
const RETRY_PAUSE: Duration = Duration::from_secs(5);

/// Serves operators for ever.
pub async fn run(node: Arc<Node>) {
    loop {
        if let Err(error) = serve(node.clone()).await {
            tracing::error!(%error, address = %node.config.grpc, "operators cannot be served; trying again");
        }
        tokio::time::sleep(RETRY_PAUSE).await;
    }
}

async fn serve(node: Arc<Node>) -> anyhow::Result<()> {
    let identity = Identity::load(&node.config.tls)?;
    let address = node.config.grpc;
    let service = HostServiceServer::new(Host { node });
    Ok(Server::builder().tls_config(identity.tonic_server())?.add_service(service).serve(address).await?)
}

#[derive(Debug)]
struct Host {
    node: Arc<Node>,
}

#[tonic::async_trait]
impl HostService for Host {
    type ConsoleStream = Pin<Box<dyn Stream<Item = Result<ConsoleOutput, Status>> + Send>>;

    async fn console(
        &self,
        request: Request<Streaming<ConsoleInput>>,
    ) -> Result<Response<Self::ConsoleStream>, Status> {
        let mut inputs = request.into_inner();
        let first = tokio::time::timeout(FIRST_INPUT_LIMIT, inputs.message()).await;
        let first = first.map_err(|_| Status::deadline_exceeded("the first input must name the vm"))??;
        let first = first.ok_or_else(|| Status::invalid_argument("the first input must name the vm"))?;
        let id: VmId = first.vm_id.parse().map_err(|error| Status::invalid_argument(format!("{error}")))?;
        let vm = self.node.vms.get(id).ok_or_else(|| Status::not_found(format!("vm {id} is not here")))?;
        let console =
            vm.console().await.map_err(|error| Status::failed_precondition(crate::error::with_causes(&error)))?;
        let (output, keys) = console.attach().await.map_err(|error| Status::unavailable(error.to_string()))?;
        tokio::spawn(async move {
            if !first.data.is_empty() && keys.send(first.data).await.is_err() {
                return;
            }
            while let Ok(Some(input)) = inputs.message().await {
                if keys.send(input.data).await.is_err() {
                    return;
                }
            }
        });
        let shown = ReceiverStream::new(output).map(|data| Ok(ConsoleOutput { data }));
        Ok(Response::new(Box::pin(shown)))
    }

    async fn open_point(&self, request: Request<OpenPointRequest>) -> Result<Response<OpenPointResponse>, Status> {
        let export = drills::open(&self.node, request.into_inner()).await.map_err(|error| drills::status(&error))?;
        Ok(Response::new(OpenPointResponse { export: Some(export) }))
    }

    async fn close_point(&self, request: Request<ClosePointRequest>) -> Result<Response<ClosePointResponse>, Status> {
        drills::close(&self.node, request.into_inner()).await.map_err(|error| drills::status(&error))?;
        Ok(Response::new(ClosePointResponse {}))
    }
}
