//! Generates the API's types and services from `proto/` without a protoc, and keeps their description for reflection.

use protox::prost::Message as _;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let files: Vec<String> = [
        "fleet",
        "replication",
        "preflight",
        "quote",
        "migration",
        "schedule",
        "worker_link",
        "cluster",
        "host",
        "peer",
    ]
    .iter()
    .map(|name| format!("proto/pageport/v1/{name}.proto"))
    .collect();
    println!("cargo:rerun-if-changed=proto");
    let descriptors = protox::compile(&files, ["proto"])?;
    let out_dir = std::path::PathBuf::from(std::env::var("OUT_DIR")?);
    std::fs::write(out_dir.join("pageport.v1.bin"), descriptors.encode_to_vec())?;
    tonic_prost_build::configure().bytes(".pageport.v1").compile_fds(descriptors)?;
    Ok(())
}
