//! Generates the API's types and services from `proto/` without a protoc.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let files: Vec<String> = ["fleet", "replication", "migration", "worker_link", "cluster", "host", "peer"]
        .iter()
        .map(|name| format!("proto/pageport/v1/{name}.proto"))
        .collect();
    println!("cargo:rerun-if-changed=proto");
    let descriptors = protox::compile(&files, ["proto"])?;
    tonic_prost_build::configure().bytes(".pageport.v1").compile_fds(descriptors)?;
    Ok(())
}
