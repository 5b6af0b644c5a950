//! A guest moves over the WAN and back: it goes on as if nothing had happened, and the records say what happened.
#![allow(clippy::unwrap_used, clippy::print_stderr)]

mod support;

use pageport_lab::demo::loads;
use pageport_lab::lab::network::GUEST_BRIDGE;
use pageport_lab::lab::{LabConfig, VmFile};
use pageport_lab::netns;
use pageport_lab::wan::flow::UDP;
use support::{Story, VM, ctl};

const RATE_BPS: u64 = 200_000_000;
/// The port of the workers' QUIC endpoints.
const PEER_PORT: u16 = 7501;
const WORKER_MEMORY_LIMIT_BYTES: u64 = 512 << 20;

#[tokio::test(flavor = "multi_thread")]
async fn a_busy_guest_moves_there_and_back_as_if_nothing_had_happened() {
    if !netns::available() {
        eprintln!("skipped: network namespaces need root");
        return;
    }
    let mut story = Story::begin(LabConfig::default(), RATE_BPS).await;
    let session = story.busy_session().await;
    a_preflight_is_green_and_what_blocks_it_fails_a_move_before_a_byte_moves(&story).await;
    let quoted = ctl(&story.lab, &["--json", "migration", "quote", VM, "--to", "b"]).await.unwrap();
    let quote: serde_json::Value = serde_json::from_str(&quoted).unwrap();
    let sent_before = sent_to_peer(&story);

    let shown = ctl(&story.lab, &["--json", "migrate", VM, "--to", "b", "--watch"]).await.unwrap();
    let there: serde_json::Value = serde_json::from_str(shown.lines().last().unwrap()).unwrap();
    assert_eq!(there["state"], "completed", "{there}");
    let record = &there["record"];
    let figure = |key: &str| record[key].as_u64().unwrap_or_else(|| panic!("no {key} in {record}"));
    let pages = |class: &str| record["pages"][class].as_u64().unwrap();
    assert_eq!(record["stream_digest_match"], true);
    assert!(figure("total_time_ms") >= figure("memory_time_ms"));
    assert!(figure("memory_time_ms") >= figure("downtime_ms"));
    assert!(figure("downtime_ms") > 0);
    assert!(figure("memory_bytes") > (pages("teleported") + pages("literal")) * 4096);
    assert!(!record["phases"].as_array().unwrap().is_empty());
    let cache_pages = story.before.page_cache_bytes / 4096;
    assert!(pages("teleported") * 100 >= cache_pages * 97, "{record} for {cache_pages} pages of clean page cache");
    // Forecast and actual are side by side, and far from each other only by what a sample may miss.
    assert_eq!(record["quote"], quote);
    let within = |forecast: &str, actual: u64| {
        let (low, high) = (quote[forecast]["low"].as_u64().unwrap(), quote[forecast]["high"].as_u64().unwrap());
        assert!(low * 3 / 4 <= actual && actual <= high * 5 / 4, "{forecast}: {actual}, {quote}");
    };
    within("teleported_bytes", pages("teleported") * 4096);
    within("zero_bytes", pages("zero") * 4096);
    within("link_bps", RATE_BPS * 9 / 10);
    assert_eq!(quote["memory_bytes"].as_u64().unwrap() % 4096, 0);
    // The worker's own count of what it sent is what came to the link, but for the headers below UDP.
    let carried = sent_to_peer(&story) - sent_before;
    let told = figure("wan_bytes") + figure("disk_wan_bytes");
    assert!((told..told + told / 5).contains(&carried), "told {told}, carried {carried}");
    story.assert_nothing_left("b").await;

    let vm = story.wait_for_vm("running").await;
    assert_eq!(vm["owner_site"], "b");
    let none = ctl(&story.lab, &["migration", "quote", VM, "--to", "b"]).await.unwrap_err();
    assert!(none.contains("already runs") && none.lines().count() == 1, "{none}");
    let refused = ctl(&story.lab, &["migrate", VM, "--to", "b"]).await.unwrap_err();
    assert!(refused.contains("b") && refused.lines().count() == 1, "{refused}");

    // What it left there of its memory is still there: only what has changed since crosses the link.
    wait_for_kept(&story, "a", 1).await;
    let shown = ctl(&story.lab, &["--json", "migrate", VM, "--to", "a", "--watch"]).await.unwrap();
    let back: serde_json::Value = serde_json::from_str(shown.lines().last().unwrap()).unwrap();
    let back_literal = back["record"]["pages"]["literal"].as_u64().unwrap();
    eprintln!("literal pages there {}, and back {back_literal}", pages("literal"));
    assert!(back_literal * 2 < pages("literal"), "{record} there, and back {back}");
    story.assert_nothing_left("a").await;
    wait_for_kept(&story, "a", 0).await;
    wait_for_kept(&story, "b", 1).await;
    let summary = session.finish().await.unwrap();
    assert!(summary.numbers > 10);
    let checks = loads::compare(&mut story.guest, &story.before, true).await.unwrap();
    assert!(checks.all(), "{checks:?}");

    for site in ["a", "b"] {
        let peak = story.lab.worker(site).peak_memory_bytes().unwrap();
        assert!(peak < WORKER_MEMORY_LIMIT_BYTES, "worker at {site} took {peak} bytes");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_is_refused_with_one_clear_line_and_nothing_happens() {
    if !netns::available() {
        eprintln!("skipped: network namespaces need root");
        return;
    }
    let mut story = Story::begin(LabConfig::default(), 20_000_000).await;
    let boot_id = story.guest.uptime().await.unwrap().1;
    let images = pageport_lab::lab::guest::GuestImages::build(pageport_lab::lab::guest::SMALL).unwrap();
    let file = VmFile::new(&story.lab, "again", &images, pageport_lab::lab::guest::SMALL).unwrap();
    let id = story.order().await;

    let table: [(&[&str], &str); 8] = [
        (&["migrate", "nobody", "--to", "b"], "nobody"),
        (&["migrate", VM, "--to", "atlantis"], "atlantis"),
        (&["migrate", VM, "--to", "a"], "a"),
        (&["migrate", VM, "--to", "b"], "already migrating"),
        (&["migrate", VM, "--to", "c"], "already migrating"),
        (&["vm", "delete", VM], VM),
        (&["vm", "define", "-f", file.path(), "--site", "atlantis"], "atlantis"),
        (&["migration", "get", "no-such-id"], "no-such-id"),
    ];
    for (arguments, named) in table {
        let refused = ctl(&story.lab, arguments).await.expect_err(&arguments.join(" "));
        let line = refused.trim();
        assert!(
            line.starts_with("error: ") && line.lines().count() == 1 && line.contains(named),
            "{arguments:?}: {line}"
        );
    }

    // Cancelled in the middle, it stays where it is.
    story.wait_for_memory(&id).await;
    ctl(&story.lab, &["migration", "cancel", &id]).await.unwrap();
    let ended = story.wait_for_end(&id).await;
    assert_eq!(ended["state"], "cancelled", "{ended}");
    story.assert_nothing_left("a").await;
    story.assert_guest_lives(&boot_id).await;

    let unseeded = ctl(&story.lab, &["migrate", VM, "--to", "c"]).await.unwrap_err();
    assert!(unseeded.contains("replica seed"), "{unseeded}");

    // The guest is ended while it moves: the migration says so, and so does the VM.
    support::set_rate(&story.lab, 20_000_000);
    let id = story.order().await;
    story.wait_for_memory(&id).await;
    let [(_, pid)] = story.lab.qemu_pids(VM).into_iter().filter(|(site, _)| *site == "a").collect::<Vec<_>>()[..]
    else {
        panic!("no hypervisor at a");
    };
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL).unwrap();
    let ended = story.wait_for_end(&id).await;
    assert_eq!(ended["state"], "failed", "{ended}");
    assert!(!ended["reason"].as_str().unwrap().is_empty());
    let vm = story.wait_for_vm("crashed").await;
    assert_eq!(vm["owner_site"], "a");
    assert!(!vm["problem"].as_str().unwrap().is_empty(), "{vm}");
    // It can be started again where it was.
    ctl(&story.lab, &["vm", "start", VM]).await.unwrap();
    let mut guest = story.lab.guest("a", pageport_lab::lab::guest::GUEST_ADDRESS).await.unwrap();
    assert_ne!(guest.uptime().await.unwrap().1, boot_id);
}

async fn a_preflight_is_green_and_what_blocks_it_fails_a_move_before_a_byte_moves(story: &Story) {
    let look = ["--json", "migration", "preflight", VM, "--to", "b"];
    let shown: serde_json::Value = serde_json::from_str(&ctl(&story.lab, &look).await.unwrap()).unwrap();
    let findings = shown["findings"].as_array().unwrap();
    assert!(findings.iter().all(|finding| finding["severity"] == "ok"), "{shown}");
    for check in ["placement", "link_back", "certificates", "machine", "disk_space", "bridges"] {
        assert!(findings.iter().any(|finding| finding["check"] == check), "{check} of {shown}");
    }

    let rename = |from: &str, to: &str| {
        let namespace = story.lab.network().namespace("b");
        for change in [&["dev", from, "down"][..], &["dev", from, "name", to], &["dev", to, "up"]] {
            netns::ip(["-n", namespace, "link", "set"].into_iter().chain(change.iter().copied())).unwrap();
        }
    };
    rename(GUEST_BRIDGE, "br-other");
    let found = ctl(&story.lab, &look[1..]).await.unwrap_err();
    assert!(found.contains("1 of the findings block"), "{found}");
    let sent_before = sent_to_peer(story);
    let ended = story.wait_for_end(&story.order().await).await;
    let reason = ended["reason"].as_str().unwrap();
    assert_eq!(ended["state"], "failed", "{ended}");
    assert!(reason.contains("worker-b has no bridge br-guest: make it there (ip link add br-guest"), "{reason}");
    let sent = sent_to_peer(story) - sent_before;
    assert!(sent < 100_000, "{sent} bytes: more than greetings");
    story.assert_nothing_left("a").await;
    rename("br-other", GUEST_BRIDGE);
}

/// Waits until so many files of memory are kept at a site.
async fn wait_for_kept(story: &Story, site: &str, count: usize) {
    let folder = story.lab.worker_data(site).join("kept");
    let kept = async {
        while files_below(&folder) != count {
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        }
    };
    let waited = tokio::time::timeout(std::time::Duration::from_secs(30), kept).await;
    waited.unwrap_or_else(|_| panic!("{} files below {}", files_below(&folder), folder.display()));
}

fn files_below(folder: &std::path::Path) -> usize {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path());
    entries.map(|path| if path.is_dir() { files_below(&path) } else { 1 }).sum()
}

fn sent_to_peer(story: &Story) -> u64 {
    let link = story.lab.network().wan().unwrap().link("a", "b").unwrap();
    // What found the queue full was sent too; next to nothing else crosses this link in such numbers.
    link.service_bytes(UDP, PEER_PORT) + link.queue_full.bytes
}
