//! Notices when the web UI was built anew.

fn main() -> std::io::Result<()> {
    // A folder that exists can be watched; an absent one would make every build a full one.
    std::fs::create_dir_all("../web-ui/dist")?;
    println!("cargo:rerun-if-changed=../web-ui/dist");
    Ok(())
}
