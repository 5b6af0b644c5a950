//! For browsers: gRPC-Web and the UI on one port, without client certificates.
//!
//! The UI's files are embedded when they were built before the controller; without them a page says how to get them.

use axum::Router;
use axum::body::Body;
use axum::http::{StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use rust_embed::RustEmbed;
use tonic_web::GrpcWebLayer;

const INDEX: &str = "index.html";
const NO_UI: &str = "<!doctype html><title>Pageport</title><p>This controller was built without the web UI. \
                     Build it with <code>make ui</code>, then build the controller again.</p>";

#[derive(RustEmbed)]
#[folder = "../web-ui/dist"]
#[allow_missing = true]
struct Assets;

/// gRPC-Web over these routes, and the UI for everything else.
pub fn router(grpc: Router) -> Router {
    grpc.layer(GrpcWebLayer::new()).fallback(asset)
}

async fn asset(uri: Uri) -> Response {
    let path = uri.path().trim_start_matches('/');
    let name = if path.is_empty() { INDEX } else { path };
    // The UI has its own routes: a path that is no file is one of them.
    let found = Assets::get(name).map(|file| (name, file)).or_else(|| {
        let is_route = !name.contains('.');
        is_route.then(|| Assets::get(INDEX)).flatten().map(|file| (INDEX, file))
    });
    match found {
        Some((name, file)) => {
            let cache = if name == INDEX { "no-cache" } else { "public, max-age=3600" };
            let headers = [(header::CONTENT_TYPE, file.metadata.mimetype()), (header::CACHE_CONTROL, cache)];
            (headers, Body::from(file.data.into_owned())).into_response()
        }
        None if name == INDEX => ([(header::CONTENT_TYPE, "text/html")], NO_UI).into_response(),
        None => StatusCode::NOT_FOUND.into_response(),
    }
}
