//! What must hold of pools: which are made, which are refused, and which merely wait.

use std::os::unix::fs::PermissionsExt as _;

use super::*;

struct Host {
    folder: tempfile::TempDir,
    store: Arc<Store>,
    id: StoreId,
}

impl Host {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let store = Arc::new(Store::open(&folder.path().join("store")).unwrap());
        Self { folder, store, id: StoreId::generate() }
    }

    fn ssd(&self) -> PathBuf {
        self.folder.path().join("srv/ssd")
    }

    /// A worker that starts with a pool "ssd" that takes scratch.
    fn start(&self) -> Result<Pools, PoolError> {
        let pool = |name: &PoolName, path| PoolConfig { name: name.clone(), path, limits: PoolLimits::default() };
        let pools = [pool(&PoolName::default(), self.folder.path().to_owned()), pool(&ssd(), self.ssd())];
        let pools = Pools::new(self.store.clone(), self.id, &pools, &ssd())?;
        pools.begin()?;
        Ok(pools)
    }
}

fn ssd() -> PoolName {
    "ssd".parse().unwrap()
}

#[test]
fn a_pool_is_made_at_the_start_and_is_the_same_one_after_the_next() {
    let host = Host::new();
    host.start().unwrap();
    let marker = std::fs::read_to_string(host.ssd().join(MARKER)).unwrap();
    assert_eq!(marker, format!("{} ssd\n", host.id));
    let mode = host.ssd().join("replicas").metadata().unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o700, "what guests have written is nobody else's");
    let pools = host.start().unwrap();
    let scratch = pools.for_scratch().unwrap().scratch();
    assert!(scratch.starts_with(host.ssd()) && scratch.is_dir());
}

#[test]
fn a_pool_that_cannot_be_made_is_a_refusal_to_start_that_names_it() {
    let host = Host::new();
    std::fs::write(host.folder.path().join("srv"), b"a file").unwrap();
    let told = host.start().unwrap_err().to_string();
    assert!(told.contains("pool \"ssd\" at") && told.contains("worker.toml"), "{told}");
}

#[test]
fn a_pool_of_another_worker_is_not_used_and_stays_as_it_is_and_the_worker_starts() {
    let (host, other) = (Host::new(), StoreId::generate());
    host.start().unwrap();
    let marker = std::fs::read(host.ssd().join(MARKER)).unwrap();
    let host = Host { id: other, ..host };
    let told = host.start().unwrap().choose(VmId::generate(), &ssd()).unwrap_err().to_string();
    assert!(told.contains("another worker's") && told.contains(MARKER), "{told}");
    assert_eq!(std::fs::read(host.ssd().join(MARKER)).unwrap(), marker);
}

#[test]
fn a_pool_that_holds_replicas_and_is_not_there_holds_up_nothing_else_and_is_good_once_it_is_back() {
    let host = Host::new();
    let (here, there, away) = (VmId::generate(), VmId::generate(), host.folder.path().join("away"));
    host.start().unwrap().choose(there, &ssd()).unwrap();
    std::fs::rename(host.ssd(), &away).unwrap();
    let pools = host.start().unwrap();
    assert!(pools.ready(here).unwrap().name().is_default());
    assert!(matches!(pools.ready(there), Err(PoolError::Gone { .. })));
    assert!(matches!(pools.leaving(there), Err(PoolError::Gone { .. })), "nothing of it would be removed");
    assert!(matches!(pools.choose(here, &ssd()), Err(PoolError::Gone { .. })));
    assert!(matches!(pools.for_scratch(), Err(PoolError::Gone { .. })), "scratch does not lie under it either");
    assert!(!host.ssd().exists(), "it is not made anew");
    pools.look_at_all(|_| 7);
    let [of_default, of_ssd] = &pools.reports()[..] else { panic!("{:?}", pools.reports()) };
    assert!(of_default.problem.is_empty() && of_default.free_bytes > 0 && !of_default.takes_scratch);
    assert!(of_ssd.problem.contains("mounted?") && of_ssd.free_bytes == 0 && of_ssd.takes_scratch);
    std::fs::rename(&away, host.ssd()).unwrap();
    assert_eq!(pools.ready(there).unwrap().name(), &ssd());
    pools.for_scratch().unwrap();
}

#[test]
fn a_pool_without_replicas_is_made_anew_where_its_file_system_is_mounted_at_last() {
    let host = Host::new();
    let pools = host.start().unwrap();
    std::fs::remove_dir_all(host.ssd()).unwrap();
    pools.choose(VmId::generate(), &ssd()).unwrap();
    assert!(host.ssd().join(MARKER).exists());
}

#[test]
fn a_pool_that_does_not_exist_is_refused_with_those_that_do_and_nothing_is_noted() {
    let host = Host::new();
    let (pools, vm) = (host.start().unwrap(), VmId::generate());
    let told = pools.choose(vm, &"hdd".parse().unwrap()).unwrap_err().to_string();
    assert!(told.contains("no pool \"hdd\"; it has: default, ssd"), "{told}");
    assert!(pools.of(vm).unwrap().name().is_default());
}
