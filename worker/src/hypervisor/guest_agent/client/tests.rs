//! Agents that do as they please, on the other end of the socket.

use std::time::Duration;

use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::net::UnixListener;

use super::*;

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(30)
}

fn now() -> Instant {
    Instant::now() + Duration::from_millis(50)
}

/// The other end. It sends what `answer` makes of each command, which is told with the number of its last sync.
async fn agent(answer: impl Fn(&str, u64) -> Vec<Vec<u8>> + Send + 'static) -> (tempfile::TempDir, Agent) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("agent.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let (client, guest) = tokio::join!(Agent::connect(&path, soon()), listener.accept());
    tokio::spawn(async move {
        let mut guest = BufReader::new(guest.unwrap().0);
        let (mut line, mut id) = (Vec::new(), 0);
        while guest.read_until(b'\n', &mut line).await.is_ok_and(|read| read > 0) {
            let start = line.iter().rposition(|byte| *byte == RESET).map_or(0, |at| at + 1);
            let command: Value = serde_json::from_slice(&line[start..]).unwrap();
            id = command["arguments"]["id"].as_u64().unwrap_or(id);
            for piece in answer(command["execute"].as_str().unwrap(), id) {
                if guest.write_all(&piece).await.is_err() {
                    return;
                }
                tokio::task::yield_now().await;
            }
            line.clear();
        }
    });
    (folder, client.unwrap())
}

fn synced(id: u64) -> Vec<u8> {
    [&[RESET], format!("{{\"return\": {id}}}\n").as_bytes()].concat()
}

/// Answers syncs as it should, and everything else with `said`.
fn saying(said: &'static str) -> impl Fn(&str, u64) -> Vec<Vec<u8>> {
    move |command, id| match command {
        "guest-sync-delimited" => vec![synced(id)],
        _ => vec![said.as_bytes().to_vec()],
    }
}

#[tokio::test]
async fn commands_are_answered() {
    let (_folder, mut agent) = agent(|command, id| match command {
        "guest-sync-delimited" => vec![synced(id)],
        "guest-fsfreeze-status" => vec![b"{\"return\": \"frozen\"}\n".to_vec()],
        "guest-fsfreeze-freeze" => vec![b"{\"return\": 2}\n".to_vec()],
        _ => vec![b"{\"return\": 0}\n".to_vec()],
    })
    .await;
    agent.sync(soon()).await.unwrap();
    assert_eq!(agent.freeze(soon()).await.unwrap(), 2);
    assert_eq!(agent.status(soon()).await.unwrap(), FreezeStatus::Frozen);
    agent.thaw(soon()).await.unwrap();
}

#[tokio::test]
async fn an_answer_in_pieces_is_one_answer() {
    let (_folder, mut agent) = agent(|command, id| {
        let whole = match command {
            "guest-sync-delimited" => synced(id),
            _ => b"{\"return\": \"thawed\"}\r\n".to_vec(),
        };
        whole.into_iter().map(|byte| vec![byte]).collect()
    })
    .await;
    assert_eq!(agent.status(soon()).await.unwrap(), FreezeStatus::Thawed);
    assert_eq!(agent.status(soon()).await.unwrap(), FreezeStatus::Thawed);
}

#[tokio::test]
async fn stale_answers_and_garbage_before_the_sync_are_skipped() {
    let (_folder, mut agent) = agent(|command, id| match command {
        "guest-sync-delimited" => {
            let stale = b"{\"return\": \"frozen\"}\n\xff{\"return\": 7}\n\xc3\x28 [[[\n\n{\"return\": ".to_vec();
            vec![format!("{{\"return\": {id}}}\n").into_bytes(), stale, synced(id)]
        }
        _ => vec![b"{\"return\": \"thawed\"}\n".to_vec()],
    })
    .await;
    assert_eq!(agent.status(soon()).await.unwrap(), FreezeStatus::Thawed);
}

#[tokio::test]
async fn an_answer_that_came_too_late_is_not_taken_for_the_next() {
    let (_folder, mut agent) = agent(|command, id| match command {
        "guest-sync-delimited" => vec![synced(id)],
        "guest-fsfreeze-freeze" => vec![],
        "guest-fsfreeze-status" => vec![b"{\"return\": \"thawed\"}\n".to_vec()],
        _ => vec![b"{\"return\": 9}\n".to_vec(), b"{\"return\": \"frozen\"}\n".to_vec()],
    })
    .await;
    assert!(matches!(agent.freeze(now()).await, Err(AgentError::NoAnswer { command: "guest-fsfreeze-freeze" })));
    agent.thaw(soon()).await.unwrap();
    assert_eq!(agent.status(soon()).await.unwrap(), FreezeStatus::Thawed);
}

#[tokio::test]
async fn who_does_not_answer_is_not_waited_for() {
    let (_folder, mut agent) = agent(|_, _| vec![]).await;
    assert!(matches!(agent.sync(now()).await, Err(AgentError::NoAnswer { .. })));
    assert!(matches!(agent.thaw(now()).await, Err(AgentError::NoAnswer { .. })));
}

#[tokio::test]
async fn a_line_without_an_end_and_a_flood_of_lines_are_cut_off() {
    for flood in [vec![b'x'; 2 * MAX_ANSWER_BYTES], b"{\"return\": 1}\n".repeat(MAX_ANSWER_BYTES / 10)] {
        let (_folder, mut agent) = agent(move |_, _| vec![flood.clone()]).await;
        assert!(matches!(agent.sync(soon()).await, Err(AgentError::TooLong { .. })));
        assert!(agent.received.len() <= MAX_ANSWER_BYTES);
    }
}

#[tokio::test]
async fn what_is_no_answer_is_an_error() {
    for said in ["nonsense\n", "[1]\n", "{}\n", "{\"return\": \"icy\"}\n", "{\"return\": -1}\n"] {
        let (_folder, mut agent) = agent(saying(said)).await;
        assert!(matches!(agent.status(soon()).await, Err(AgentError::Garbled { .. })), "{said}");
        assert!(matches!(agent.freeze(soon()).await, Err(AgentError::Garbled { .. })), "{said}");
    }
}

#[tokio::test]
async fn a_refusal_is_told_in_the_agents_words_without_their_tricks() {
    let (_folder, mut agent) =
        agent(saying("{\"error\": {\"class\": \"GenericError\", \"desc\": \"no\\u001b[2J\\nway\"}}\n")).await;
    let refused = agent.freeze(soon()).await.unwrap_err();
    assert_eq!(refused.to_string(), "the guest agent refuses \"guest-fsfreeze-freeze\": no[2Jway");
}

#[tokio::test]
async fn a_socket_that_closes_is_broken() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("agent.sock");
    assert!(Agent::connect(&path, soon()).await.unwrap_err().is_broken());
    let listener = UnixListener::bind(&path).unwrap();
    let (agent, guest) = tokio::join!(Agent::connect(&path, soon()), listener.accept());
    drop(guest);
    assert!(agent.unwrap().sync(soon()).await.unwrap_err().is_broken());
}
