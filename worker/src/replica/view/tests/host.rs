//! Views with files of the host.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use pageport_proto::VmId;

use super::*;

fn files(folder: &Path) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(folder) else { return vec![] };
    let paths = entries.map(|entry| entry.unwrap().path());
    paths.flat_map(|path| if path.is_dir() { files(&path) } else { vec![path] }).collect()
}

fn fill(view: &ReplicaView, blocks: u64) {
    view.start_over(0, "root", blocks * BLOCK_BYTES).unwrap();
    let mut digests = vec![];
    for block in 0..blocks {
        let hash = blake3::hash(&block.to_le_bytes());
        digests.push(BlockDigest(*hash.as_bytes().first_chunk().unwrap()));
        if digests.len() == 256 || block + 1 == blocks {
            let first_block = block + 1 - digests.len() as u64;
            view.confirm(0, point(0), Confirmed::Digests { first_block, digests: &digests }).unwrap();
            digests.clear();
        }
    }
    view.keep(None, point(1), 1);
}

#[tokio::test]
async fn a_view_is_there_again_after_a_restart_and_its_files_go_with_the_vm() {
    let folder = tempfile::tempdir().unwrap();
    let (vm, other) = (VmId::generate(), VmId::generate());
    let views = Views::new(folder.path());
    fill(&*views.of(vm, "b").await, 5000);
    fill(&*views.of(vm, "c").await, 10);
    fill(&*views.of(other, "b").await, 10);
    drop(views);

    let views = Views::new(folder.path());
    views.retain(|id| id == vm).await;
    let view = views.of(vm, "b").await;
    assert_eq!(view.state_of(0, "root", 5000 * BLOCK_BYTES), point(1));
    assert_eq!(view.size().0, 5000);
    assert_eq!(views.of(other, "b").await.state(0), ReplicaState::default());
    assert_eq!(files(folder.path()).len(), 2);
    views.forget_peer(vm, "c").await;
    assert_eq!(files(folder.path()).len(), 1);
    views.forget(vm).await;
    assert_eq!(files(folder.path()), Vec::<PathBuf>::new());
    assert_eq!(view.size().0, 5000, "who still has the view can still ask it");
    assert_eq!(views.of(vm, "b").await.size().0, 0);
}

#[tokio::test]
async fn a_block_costs_less_than_24_bytes_of_memory_and_file_when_all_differ() {
    const MANY: u64 = 1 << 17;
    let folder = tempfile::tempdir().unwrap();
    let vm = VmId::generate();
    fill(&*Views::new(folder.path()).of(vm, "b").await, MANY);
    let view = Views::new(folder.path()).of(vm, "b").await;
    let (contents, memory_bytes) = view.size();
    assert_eq!(contents, MANY as usize);
    let file_bytes: u64 = files(folder.path()).iter().map(|path| path.metadata().unwrap().blocks() * 512).sum();
    assert!(memory_bytes < MANY as usize * 8, "{memory_bytes} bytes of memory");
    assert!(memory_bytes as u64 + file_bytes < MANY * 24, "{memory_bytes} bytes of memory, {file_bytes} of file");
}

#[tokio::test]
async fn zeros_take_no_space_and_blocks_that_become_zeros_give_it_back() {
    let folder = tempfile::tempdir().unwrap();
    let view = Views::new(folder.path()).of(VmId::generate(), "b").await;
    fill(&view, 1 << 16);
    let space = || files(folder.path()).iter().map(|path| path.metadata().unwrap().blocks() * 512).sum::<u64>();
    let full = space();
    assert!(full >= 1 << 20, "{full}");
    let attempt = view.begin_attempt();
    view.confirm(0, point(1), Confirmed::Zero { first_block: 0, blocks: 1 << 16 }).unwrap();
    view.keep(Some(attempt), point(2), 1);
    assert!(space() < full / 8, "{} of {full}", space());
}

#[tokio::test]
async fn a_folder_that_cannot_be_written_leaves_the_view_in_memory() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("index"), "a file where the folder should be").unwrap();
    let views = Views::new(folder.path());
    let vm = VmId::generate();
    let view = views.of(vm, "b").await;
    fill(&view, 100);
    assert_eq!((view.state(0), view.size().0), (point(1), 100));
    views.forget(vm).await;
}

#[tokio::test]
async fn a_peer_whose_name_is_no_name_has_no_files() {
    let folder = tempfile::tempdir().unwrap();
    let views = Views::new(folder.path());
    let view = views.of(VmId::generate(), "../../b").await;
    fill(&view, 100);
    assert_eq!(view.state(0), point(1));
    assert_eq!(files(folder.path()), Vec::<PathBuf>::new());
}
