//! Agents and gateways that say what can't be, and registries with mistakes.

use std::time::{Duration, Instant};

use futures::{StreamExt as _, stream};
use tokio::time::timeout;
use tonic::{Code, Status};
use wharf::rpc::proto::{
    agent::{
        self, AgentMessage, CopyReport, Hello, Reports, SchedulerMessage, agent_hub_client::AgentHubClient,
        agent_message::Message as Word, scheduler_message::Message as Down,
    },
    routes::{self, GatewayMessage, gateway_message::Message as GatewayWord, routes_client::RoutesClient},
};

use crate::{
    Tried, channel,
    raw::PATIENCE,
    refused,
    up::{self, SOON, Up},
};

/// A session in which the agent says these words and then waits; what the scheduler says first.
async fn agent(address: &str, words: Vec<Option<Word>>) -> Result<Option<SchedulerMessage>, Status> {
    let words = words.into_iter().map(|message| AgentMessage { message });
    let said = stream::iter(words).chain(stream::pending());
    let mut client = AgentHubClient::new(channel(address).await);
    let session = timeout(PATIENCE, client.session(said)).await.expect("an answer in time")?;
    timeout(PATIENCE, session.into_inner().message()).await.expect("a word in time")
}

fn hello(server: &str, replica: u32) -> Hello {
    let capacity = Some(agent::Resources { primary: 1 << 30, ..agent::Resources::default() });
    let (server, door) = (server.to_owned(), "127.0.0.1:1".to_owned());
    let capabilities = vec!["onnx".to_owned()];
    Hello { server, replica, capacity, capabilities, door, ..Hello::default() }
}

#[tokio::test]
async fn agents_that_say_what_cannot_be() {
    let tried = Tried::start(&[]);
    let agents = &tried.up.agents;
    let text = refused(agent(agents, vec![None]).await, Code::InvalidArgument, "an empty word");
    assert!(text.contains("hello"), "{text}");
    for word in [
        Word::Heartbeat(agent::Heartbeat::default()),
        Word::Goodbye(agent::Goodbye {}),
        Word::Reports(Reports { reports: vec![CopyReport::default()] }),
    ] {
        let text = refused(agent(agents, vec![Some(word)]).await, Code::InvalidArgument, "no hello");
        assert!(text.contains("hello"), "{text}");
    }
    let long = "a".repeat(1000);
    for name in ["", "Not A Server", "../onnx", "a\0b", &long] {
        let text = refused(agent(agents, vec![Some(Word::Hello(hello(name, 0)))]).await, Code::InvalidArgument, name);
        assert!(text.contains("server") && text.len() < 1000, "{text}");
    }
    let mut nameless = hello("onnx", 1);
    nameless.inventory = vec![CopyReport::default()];
    let answer = agent(agents, vec![Some(Word::Hello(nameless))]).await;
    let status = answer.expect_err("an inventory of nothing");
    assert!(!status.message().is_empty(), "{status:?}");
    // One that the registry does not have is refused in the session, with words.
    for replica in [2, 9, u32::MAX] {
        let word = agent(agents, vec![Some(Word::Hello(hello("onnx", replica)))]).await.unwrap().unwrap().message;
        let Some(Down::Refused(refused)) = word else { panic!("replica {replica} is taken: {word:?}") };
        assert!(refused.reason.contains("2 replicas"), "{refused:?}");
    }
    tried.unharmed("agents that say what can't be").await;
}

#[tokio::test]
async fn an_agent_that_can_not_read_an_order_is_a_condition_of_its_server() {
    let up = Up::start(&[]);
    let misread = Word::Misread(agent::Misread { problem: format!("order is absent\u{7}{}", "!".repeat(1000)) });
    let hello = Hello { agent_version: "0.0.1".to_owned(), ..hello("old", 0) };
    let words = stream::iter([Word::Hello(hello), misread].map(|word| AgentMessage { message: Some(word) }));
    let mut client = AgentHubClient::new(channel(&up.agents).await);
    let session = timeout(PATIENCE, client.session(words.chain(stream::pending()))).await.expect("in time").unwrap();
    let deadline = Instant::now() + SOON;
    let told = loop {
        let servers: serde_json::Value = serde_json::from_str(&up.says(&["server", "list", "-o", "json"])).unwrap();
        let old = servers.as_array().unwrap().iter().find(|server| server["name"] == "old");
        if let Some(told) = old.and_then(|server| server["conditions"][0].as_str()) {
            break told.to_owned();
        }
        assert!(Instant::now() < deadline, "no condition: {servers:#}\n{}", up.tail());
        tokio::time::sleep(Duration::from_millis(50)).await;
    };
    assert!(told.starts_with("agent old-0 (version 0.0.1) can't read an order: order is absent!!"), "{told}");
    assert!(told.ends_with("; upgrade the agent") && told.len() < 1000, "{told}");
    drop(session);
}

/// A session in which the gateway says these words and then waits; what the scheduler says first.
async fn gateway(address: &str, words: Vec<Option<GatewayWord>>) -> Result<Option<routes::RoutesMessage>, Status> {
    let words = words.into_iter().map(|message| GatewayMessage { message });
    let said = stream::iter(words).chain(stream::pending());
    let mut client = RoutesClient::new(channel(address).await);
    let session = timeout(PATIENCE, client.watch(said)).await.expect("an answer in time")?;
    timeout(PATIENCE, session.into_inner().message()).await.expect("a word in time")
}

#[tokio::test]
async fn gateways_that_say_what_cannot_be() {
    let tried = Tried::start(&[]);
    let agents = &tried.up.agents;
    let acknowledged = GatewayWord::Acknowledged(routes::Acknowledged { epoch: u64::MAX });
    for word in [None, Some(acknowledged.clone())] {
        let text = refused(gateway(agents, vec![word]).await, Code::InvalidArgument, "no hello");
        assert!(text.contains("hello"), "{text}");
    }
    let nameless = GatewayWord::Hello(routes::Hello::default());
    let text = refused(gateway(agents, vec![Some(nameless)]).await, Code::InvalidArgument, "no name");
    assert!(text.contains("name"), "{text}");
    let long = GatewayWord::Hello(routes::Hello { gateway: "g".repeat(1 << 20), ..routes::Hello::default() });
    let text = refused(gateway(agents, vec![Some(long)]).await, Code::InvalidArgument, "a name of 1 MiB");
    assert!(text.contains("name") && text.len() < 1000, "{text}");
    // One that holds and acknowledges what never was is served, and forgotten once its lease is over.
    for name in 0..20 {
        let (gateway_name, lineage) = (format!("liar-{name}"), "never".to_owned());
        let hello = GatewayWord::Hello(routes::Hello {
            gateway: gateway_name,
            lineage,
            epoch: u64::MAX,
            ..routes::Hello::default()
        });
        gateway(agents, vec![Some(hello), None, Some(acknowledged.clone())]).await.unwrap();
    }
    tried.unharmed("gateways that say what can't be").await;
}

#[test]
fn a_registry_with_a_typo_stops_the_start() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("servers.toml");
    for (from, to, words) in [
        ("replicas", "replicsa", ["replicsa", "replicas", "5"]),
        ("\"1Gi\"", "\"1Gg\"", ["memory", "1Gg", "6"]),
        ("\"builtin\"", "\"bultin\"", ["bultin", "builtin", "3"]),
        ("[[server]]", "[[servers]]", ["servers", "server", "1"]),
        ("\"onnx\"\nruntime", "\"Onnx\"\nruntime", ["Onnx", "name", "2"]),
        ("replicas = 2", "replicas = -2", ["replicas", "-2", "5"]),
        ("replicas = 2", "replicas = ", ["5", "", ""]),
    ] {
        std::fs::write(&path, up::REGISTRY.replacen(from, to, 1)).unwrap();
        let mut command = up::wharf();
        command.arg("up").current_dir(dir.path());
        for port in ["scheduler.listen", "scheduler.agents", "scheduler.http", "gateway.listen"] {
            command.arg("--set").arg(format!("{port}=127.0.0.1:0"));
        }
        command.arg("--set").arg("scheduler.servers=servers.toml");
        let output = command.output().unwrap();
        let said = up::said(&output);
        assert!(!output.status.success(), "{to}: {said}");
        assert!(words.iter().all(|word| said.contains(word)), "{to}: not all of {words:?} in: {said}");
    }
}

#[tokio::test]
async fn a_typo_in_the_registry_of_a_running_process_changes_nothing() {
    let tried = Tried::start(&[]);
    let path = tried.up.path().join("servers.toml");
    let servers = tried.up.says(&["server", "list"]);
    std::fs::write(&path, up::REGISTRY.replacen("replicas", "replicsa", 1)).unwrap();
    let deadline = std::time::Instant::now() + up::SOON;
    while !tried.up.log().contains("replicsa") {
        assert!(std::time::Instant::now() < deadline, "nothing is said of it:\n{}", tried.up.tail());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert!(tried.up.log().contains("refused"), "{}", tried.up.tail());
    assert_eq!(tried.up.says(&["server", "list"]), servers);
    std::fs::write(&path, up::REGISTRY).unwrap();
    tried.unharmed("a typo in the registry").await;
}
