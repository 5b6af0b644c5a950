//! Agents that answer, do not, or too late; what they were told, and when they were told to thaw.

use std::sync::{Arc, Mutex};

use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::UnixListener;

use super::*;

/// What a guest is asked, in order; and what it does not answer.
struct Guest {
    folder: tempfile::TempDir,
    asked: Arc<Mutex<Vec<String>>>,
    silent: Arc<Mutex<Vec<&'static str>>>,
    _ended: watch::Sender<Option<ExitReport>>,
    ended: watch::Receiver<Option<ExitReport>>,
    turn: Arc<tokio::sync::Mutex<()>>,
}

impl Guest {
    fn new(frozen: bool, silent: &[&'static str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(folder.path().join("agent.sock")).unwrap();
        let (asked, silent) = (Arc::new(Mutex::new(vec![])), Arc::new(Mutex::new(silent.to_vec())));
        let (sender, ended) = watch::channel(None);
        tokio::spawn(answer(listener, frozen, asked.clone(), silent.clone()));
        Self { folder, asked, silent, _ended: sender, ended, turn: Arc::default() }
    }

    fn task(&self) -> Task {
        Task {
            vm: VmId::generate(),
            socket: self.folder.path().join("agent.sock"),
            note: self.note(),
            ended: self.ended.clone(),
            turn: self.turn.clone().try_lock_owned().unwrap(),
        }
    }

    fn note(&self) -> PathBuf {
        self.folder.path().join("frozen")
    }

    fn asked(&self) -> Vec<String> {
        self.asked.lock().unwrap().clone()
    }

    /// Waits until nobody holds the agent any more.
    async fn let_go(&self) {
        drop(tokio::time::timeout(Duration::from_secs(30), self.turn.lock()).await.unwrap());
        assert!(!self.note().exists());
    }
}

async fn answer(
    listener: UnixListener,
    mut frozen: bool,
    asked: Arc<Mutex<Vec<String>>>,
    silent: Arc<Mutex<Vec<&'static str>>>,
) {
    while let Ok((client, _)) = listener.accept().await {
        let (mut client, mut line) = (BufReader::new(client), Vec::new());
        while client.read_until(b'\n', &mut line).await.is_ok_and(|read| read > 0) {
            let start = line.iter().rposition(|byte| *byte == 0xff).map_or(0, |at| at + 1);
            let command: Value = serde_json::from_slice(&line[start..]).unwrap();
            line.clear();
            let name = command["execute"].as_str().unwrap();
            if name != "guest-sync-delimited" {
                asked.lock().unwrap().push(name.trim_start_matches("guest-fsfreeze-").to_owned());
            }
            let value = match name {
                "guest-sync-delimited" => command["arguments"]["id"].clone(),
                "guest-fsfreeze-status" => json!(if frozen { "frozen" } else { "thawed" }),
                _ => {
                    frozen = name == "guest-fsfreeze-freeze";
                    json!(1)
                }
            };
            if silent.lock().unwrap().iter().any(|silent| name.ends_with(silent)) {
                continue;
            }
            let reset: &[u8] = if name == "guest-sync-delimited" { &[0xff] } else { &[] };
            let said = [reset, json!({ "return": value }).to_string().as_bytes(), b"\n"].concat();
            if client.write_all(&said).await.is_err() {
                break;
            }
        }
    }
}

#[tokio::test]
async fn a_guest_is_at_rest_until_it_is_thawed_and_a_note_says_so_meanwhile() {
    let guest = Guest::new(false, &[]);
    let at_rest = guest.task().begin().await.unwrap();
    assert!(guest.note().exists());
    assert_eq!(guest.asked(), ["status", "freeze"]);
    let Quiescence { quiesced, problem } = at_rest.thaw().await;
    assert!(quiesced && problem.is_none(), "{problem:?}");
    assert_eq!(guest.asked(), ["status", "freeze", "status", "thaw"]);
    guest.let_go().await;
}

#[tokio::test]
async fn a_dropped_handle_and_a_window_that_is_over_thaw() {
    let guest = Guest::new(false, &[]);
    drop(guest.task().begin().await.unwrap());
    guest.let_go().await;
    assert_eq!(guest.asked(), ["status", "freeze", "thaw"]);

    let guest = Guest::new(false, &[]);
    let at_rest = guest.task().begin().await.unwrap();
    guest.let_go().await;
    assert_eq!(guest.asked(), ["status", "freeze", "thaw"]);
    let Quiescence { quiesced, problem } = at_rest.thaw().await;
    assert!(!quiesced && matches!(problem, Some(NotQuiesced::NotLongEnough)), "{problem:?}");
}

#[tokio::test]
async fn a_guest_without_an_agent_is_never_told_to_freeze() {
    let guest = Guest::new(false, &["sync-delimited", "status"]);
    assert!(matches!(guest.task().begin().await, Err(NotQuiesced::NoAgent(_))));
    assert_eq!(guest.asked(), [""; 0]);
    guest.let_go().await;
}

#[tokio::test]
async fn a_freeze_without_an_answer_is_followed_by_a_thaw() {
    let guest = Guest::new(false, &["freeze"]);
    assert!(matches!(guest.task().begin().await, Err(NotQuiesced::Freeze(AgentError::NoAnswer { .. }))));
    guest.let_go().await;
    assert_eq!(guest.asked(), ["status", "freeze", "thaw"]);
}

#[tokio::test]
async fn a_thaw_without_an_answer_is_told_and_repeated_until_it_has_one() {
    let guest = Guest::new(false, &["thaw"]);
    let Quiescence { quiesced, problem } = guest.task().begin().await.unwrap().thaw().await;
    assert!(quiesced && matches!(problem, Some(NotQuiesced::ThawUnanswered)), "{problem:?}");
    assert!(guest.note().exists());
    assert!(guest.turn.try_lock().is_err());
    guest.silent.lock().unwrap().clear();
    guest.let_go().await;
    assert_eq!(guest.asked().last().unwrap(), "thaw");
}

#[tokio::test]
async fn file_systems_that_are_frozen_already_are_thawed() {
    let guest = Guest::new(true, &[]);
    assert!(matches!(guest.task().begin().await, Err(NotQuiesced::WasFrozen)));
    guest.let_go().await;
    assert_eq!(guest.asked(), ["status", "thaw"]);

    let guest = Guest::new(true, &[]);
    std::fs::write(guest.note(), b"").unwrap();
    let task = guest.task();
    tokio::spawn(async move { task.thaw(None, None).await });
    guest.let_go().await;
    assert_eq!(guest.asked(), ["thaw"]);
}
