//! The views of all replicas that this worker's VMs have elsewhere, and the folders of their index files.
//!
//! | where | what |
//! |---|---|
//! | `<data_dir>/index/<vm>/<peer>/<number of the disk>` | an index file |
//!
//! A view is loaded when it is first asked for. Its files go when the VM leaves this worker, and when it is no longer protected to the
//! peer; at the start of the worker those of VMs go that it does not own.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;
use std::{fs, io};

use pageport_proto::VmId;
use pageport_proto::ids::is_name;
use tokio::sync::OnceCell;

use super::ReplicaView;
use super::account::Account;
use super::medium::HostShelf;

/// All of them.
#[derive(Debug)]
pub struct Views {
    folder: PathBuf,
    all: Mutex<ByReplica>,
}

/// By VM and peer; empty until it is loaded.
type ByReplica = HashMap<(VmId, String), Arc<OnceCell<Arc<ReplicaView>>>>;

impl Views {
    /// Those whose files lie below `data_dir`.
    pub fn new(data_dir: &Path) -> Self {
        Self { folder: data_dir.join("index"), all: Mutex::default() }
    }

    /// The view of a VM's replica at a peer; the first to ask waits until it is loaded.
    pub async fn of(&self, vm: VmId, peer: &str) -> Arc<ReplicaView> {
        let cell = self.lock().entry((vm, peer.to_owned())).or_default().clone();
        let folder = is_name(peer).then(|| self.folder.join(vm.to_string()).join(peer));
        let loaded = cell.get_or_init(|| async move {
            let loading = tokio::task::spawn_blocking(move || folder.map(|folder| load(vm, &folder)));
            Arc::new(loading.await.ok().flatten().unwrap_or_default())
        });
        loaded.await.clone()
    }

    /// Forgets a VM that has left, or that is gone.
    pub async fn forget(&self, vm: VmId) {
        self.lock().retain(|(of, _), _| *of != vm);
        remove(vec![self.folder.join(vm.to_string())]).await;
    }

    /// Forgets a VM's replica at a peer.
    pub async fn forget_peer(&self, vm: VmId, peer: &str) {
        self.lock().remove(&(vm, peer.to_owned()));
        if is_name(peer) {
            remove(vec![self.folder.join(vm.to_string()).join(peer)]).await;
        }
    }

    /// Removes the files of all VMs but those that an earlier worker has left here. To be called before any view is asked for.
    pub async fn retain(&self, keep: impl Fn(VmId) -> bool) {
        let entries = match fs::read_dir(&self.folder) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return,
            Err(error) => return tracing::warn!(%error, "index files cannot be listed"),
        };
        let stale = entries.flatten().filter(|entry| {
            let vm = entry.file_name().to_string_lossy().parse::<VmId>();
            !vm.is_ok_and(&keep)
        });
        remove(stale.map(|entry| entry.path()).collect()).await;
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, ByReplica> {
        self.all.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn load(vm: VmId, folder: &Path) -> ReplicaView {
    let began = Instant::now();
    let account = Account::load(Box::new(HostShelf(folder.to_owned())));
    let (contents, memory_bytes) = account.size();
    if contents > 0 {
        let duration_ms = began.elapsed().as_millis() as u64;
        tracing::info!(vm_id = %vm, folder = %folder.display(), contents, memory_bytes, duration_ms, "block index loaded");
    }
    ReplicaView { account: account.into() }
}

/// A view that still has such a file open goes on with it, unseen.
async fn remove(paths: Vec<PathBuf>) {
    let removing = tokio::task::spawn_blocking(move || {
        for path in paths {
            let removed = if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
            match removed {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    tracing::warn!(path = %path.display(), %error, "index files are left behind");
                }
                _ => {}
            }
        }
    });
    if let Err(error) = removing.await {
        tracing::warn!(%error, "index files are left behind");
    }
}
