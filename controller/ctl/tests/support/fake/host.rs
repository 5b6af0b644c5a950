//! The fake of the host service: what a worker answers itself.

use pageport_proto::v1;
use pageport_proto::v1::host_service_server::HostService;
use tokio_stream::StreamExt;
use tonic::{Request, Response, Status, Streaming};

use super::{Boxed, Fake, Reply};

#[tonic::async_trait]
impl HostService for Fake {
    type ConsoleStream = Boxed<v1::ConsoleOutput>;

    /// Greets with the VM's id, then says everything back in capitals; "bye" ends the stream.
    async fn console(&self, request: Request<Streaming<v1::ConsoleInput>>) -> Reply<Self::ConsoleStream> {
        let mut input = request.into_inner();
        let hello = input.message().await?.ok_or_else(|| Status::invalid_argument("no hello"))?;
        if !self.script().vms.iter().any(|vm| vm.id == hello.vm_id) {
            return Err(Status::not_found("no such VM runs here"));
        }
        let greeting = v1::ConsoleOutput { data: format!("[{}]", hello.vm_id).into_bytes().into() };
        let echo = input
            .take_while(|item| !matches!(item, Ok(input) if &input.data[..] == b"bye\n"))
            .map(|item| item.map(|input| v1::ConsoleOutput { data: input.data.to_ascii_uppercase().into() }));
        Ok(Response::new(Box::pin(tokio_stream::once(Ok(greeting)).chain(echo))))
    }

    async fn open_point(&self, request: Request<v1::OpenPointRequest>) -> Reply<v1::OpenPointResponse> {
        self.fail()?;
        let request = request.into_inner();
        let export = v1::PointExport { vm_id: request.vm_id.clone(), number: request.number, ..Default::default() };
        self.script().opened.push(request);
        Ok(Response::new(v1::OpenPointResponse { export: Some(export) }))
    }

    async fn close_point(&self, request: Request<v1::ClosePointRequest>) -> Reply<v1::ClosePointResponse> {
        self.fail()?;
        self.script().closed.push(request.into_inner());
        Ok(Response::new(v1::ClosePointResponse {}))
    }
}
