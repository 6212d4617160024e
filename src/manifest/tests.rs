use proptest::prelude::{
    Just, Strategy as Generate, TestCaseError, any, prop_assert_eq, prop_compose, prop_oneof, proptest,
};

use super::*;
use crate::domain::{
    memory::Bytes,
    names::{ModelName, ServerName},
    spec::{
        Companion, DeploymentPatch, KubernetesMeta, ModelSpec, Parameter, Passthrough, Reference, Replicas, Spread,
        Storage, Strategy,
    },
    warmup::Warmup,
};

fn model(spec: &str) -> Result<Definition, ManifestError> {
    let indented: String = spec.lines().map(|line| format!("  {line}\n")).collect();
    let text =
        format!("apiVersion: {API_VERSION}\nkind: Model\nmetadata:\n  name: iris\nspec:\n  storageUri: /m\n{indented}");
    let document = parse("m.yaml", &text)?.remove(0);
    match document.kind {
        Kind::Model(definition) => Ok(*definition),
        Kind::Server(server) => panic!("{server:?}"),
    }
}

fn problem(spec: &str) -> String {
    model(spec).expect_err(spec).to_string()
}

fn replicas_of(spec: &str) -> Replicas {
    model(spec).expect(spec).deployment.replicas.expect("a manifest always speaks of replicas")
}

#[test]
fn the_smallest_model_is_one_copy_and_nothing_else() {
    let definition = model("").unwrap();
    assert_eq!(definition.spec, ModelSpec { uri: "/m".into(), ..ModelSpec::default() });
    let replicas = Some(Replicas { replicas: 1, min: 0, max: 0, log_payloads: false });
    assert_eq!(definition.deployment, DeploymentPatch { replicas, ..DeploymentPatch::default() });
    assert_eq!(definition.kubernetes, None);
}

#[test]
fn the_model_type_is_the_last_requirement() {
    let definition = model("requirements: [a, b]\nmodelType: sklearn").unwrap();
    assert_eq!(definition.spec.requirements, ["a", "b", "sklearn"]);
}

#[test]
fn replicas_follow_seldons_rules() {
    let counts = |spec| {
        let replicas = replicas_of(spec);
        (replicas.replicas, replicas.min, replicas.max)
    };
    assert_eq!(counts(""), (1, 0, 0));
    assert_eq!(counts("replicas: 0"), (0, 0, 0));
    assert_eq!(counts("minReplicas: 2"), (2, 2, 0));
    assert_eq!(counts("minReplicas: 2\nreplicas: 3\nmaxReplicas: 4"), (3, 2, 4));
    assert!(problem("replicas: 1\nminReplicas: 2").contains("spec.replicas: 1 is less than minReplicas 2"));
    assert!(problem("minReplicas: 3\nmaxReplicas: 2").contains("spec.minReplicas: 3 is more than maxReplicas 2"));
    assert!(problem("replicas: 3\nmaxReplicas: 2").contains("spec.replicas: 3 is more than maxReplicas 2"));
    assert!(problem("maxReplicas: 0").contains("spec.replicas: 1 is more than maxReplicas 0"));
    assert!(problem("replicas: -1").contains("spec.replicas: -1 is negative"));
    assert!(problem("replicas: 99999999999").contains("too large"));
    assert!(problem("replicas: 20000").contains("more than the 10000"));
    assert!(problem("replicas: '3'").contains("it is text, wanted a whole number"));
}

#[test]
fn memory_is_a_kubernetes_quantity() {
    let memory = |spec| model(spec).expect(spec).spec.memory;
    assert_eq!(memory("memory: 100Ki"), Some(Bytes(102_400)));
    assert_eq!(memory("memory: 1.5Gi"), Some(Bytes(1_610_612_736)));
    assert_eq!(memory("memory: '1G'"), Some(Bytes(1_000_000_000)));
    assert_eq!(memory("memory: 334000000"), Some(Bytes(334_000_000)));
    assert_eq!(memory("memory: 1e9"), Some(Bytes(1_000_000_000)));
    assert_eq!(memory("memory: 18446744073709551615"), Some(Bytes(u64::MAX)));
    assert_eq!(memory("memory: 0"), None);
    assert_eq!(memory("memory:"), None);
    for (bad, why) in [
        ("memory: -1", "negative"),
        ("memory: 100m", "whole number of bytes"),
        ("memory: 0.5", "whole number of bytes"),
        ("memory: 18446744073709551616", "counted"),
        ("memory: 5 apples", "suffix"),
        ("memory: [1]", "wanted a quantity"),
        ("memory: true", "wanted a quantity"),
        ("memory: 1e400", ""),
    ] {
        let problem = problem(bad);
        assert!(problem.contains(why), "{bad}: {problem}");
    }
}

#[test]
fn what_wharf_adds_is_read() {
    let deployment = model("strategy: recreate\nspread: servers\npriority: -5\npinned: true").unwrap().deployment;
    assert_eq!(deployment.strategy, Some(Strategy::Recreate));
    assert_eq!((deployment.spread, deployment.priority), (Some(Spread::Servers), Some(-5)));
    assert_eq!(deployment.pinned, Some(true));
    let surge = model("maxSurge: 2").unwrap().deployment.strategy;
    assert_eq!(surge, Some(Strategy::RollingUpdate { max_surge: 2, max_unavailable: 0 }));
    assert!(problem("strategy: blueGreen").contains("wanted rollingUpdate or recreate"));
    assert!(problem("spread: wide").contains("wanted servers or oneServer"));
    assert!(problem("strategy: recreate\nmaxSurge: 1").contains("mean nothing with strategy: recreate"));
    assert!(problem("maxSurge: 0\nmaxUnavailable: 0").contains("spec.maxSurge"));
    assert!(problem("maxSurge: 25%").contains("wanted a whole number"));
}

#[test]
fn companions_refer_to_one_thing() {
    let companion = model("explainer:\n  type: anchor_tabular\n  modelRef: income").unwrap().spec.companion;
    let of = Reference::Model("income".into());
    assert_eq!(companion, Some(Companion::Explainer { kind: "anchor_tabular".into(), of }));
    let llm = model("llm: {pipelineRef: chat}").unwrap().spec.companion;
    assert_eq!(llm, Some(Companion::Llm { of: Reference::Pipeline("chat".into()) }));
    assert!(problem("llm: {}").contains("spec.llm.modelRef: it refers to nothing"));
    assert!(problem("llm: {modelRef: a, pipelineRef: b}").contains("leave one out"));
    assert!(problem("llm: {modelRef: a}\nexplainer: {modelRef: a}").contains("both set"));
}

#[test]
fn a_typo_names_its_line_and_the_nearest_field() {
    assert_eq!(
        problem("replicas: 2\nrequirments: [a]"),
        "m.yaml:8: document 1: spec.requirments: no such field; did you mean requirements?"
    );
    assert!(problem("storageuri: x").contains("did you mean storageUri?"));
    assert!(problem("qqqqqqqq: x").contains("known here are artifactVersion, dataflow, dedicated, explainer"));
    assert!(problem("logger: {procent: 5}").contains("spec.logger.procent: no such field; did you mean percent?"));
    assert!(problem("parameters: [{name: a, valeu: b}]").contains("[0].valeu: no such field; did you mean value?"));
    assert!(problem("parameters: [{name: a}]").contains("spec.parameters[0].value: it is missing"));
    let misspelt = "apiVersion: mlops.seldon.io/v1alpha1\nkind: Model\nmetadata: {name: a}\nspec:\n  storagUri: x";
    let problem = parse("m.yaml", misspelt).unwrap_err().to_string();
    assert_eq!(problem, "m.yaml:5: document 1: spec.storagUri: no such field; did you mean storageUri?");
}

#[test]
fn text_that_yaml_reads_as_something_else_asks_for_quotes() {
    for spec in ["requirements: [1]", "secretName: true", "server: 5", "parameters: [{name: a, value: 1.5}]"] {
        assert!(problem(spec).contains("put it in quotes"), "{spec}");
    }
    assert_eq!(model("parameters: [{name: a, value: ''}]").unwrap().spec.parameters[0].value, "");
}

#[test]
fn a_path_that_steps_up_is_refused_with_its_line() {
    let text = format!("apiVersion: {API_VERSION}\nkind: Model\nmetadata: {{name: a}}\nspec:\n  storageUri: /m/../x\n");
    let problem = parse("m.yaml", &text).unwrap_err().to_string();
    assert!(problem.starts_with("m.yaml:5: document 1: spec.storageUri:"), "{problem}");
}

#[test]
fn kinds_that_are_not_supported_say_so() {
    for (kind, said) in [
        ("Pipeline", "Kafka"),
        ("Experiment", "not supported yet"),
        ("ServerConfig", "describes pods"),
        ("SeldonRuntime", "wharf.toml"),
        ("Modell", "did you mean Model?"),
        ("Deployment", "wanted Model or Server"),
        ("PipelineList", "not supported"),
    ] {
        let text = format!("apiVersion: {API_VERSION}\nkind: {kind}\nmetadata: {{name: a}}\nspec: {{}}\n");
        let problem = parse("m.yaml", &text).unwrap_err().to_string();
        assert!(problem.starts_with("m.yaml:2: document 1: kind: "), "{problem}");
        assert!(problem.contains(said), "{problem}");
    }
}

#[test]
fn a_list_from_kubernetes_is_its_items() {
    let item = |name: &str| {
        format!(
            "- apiVersion: {API_VERSION}\n  kind: Model\n  metadata: {{name: {name}}}\n  spec: {{storageUri: /m}}\n"
        )
    };
    let text =
        format!("apiVersion: v1\nkind: List\nmetadata: {{resourceVersion: ''}}\nitems:\n{}{}", item("a"), item("b"));
    let documents = parse("m.yaml", &text).unwrap();
    assert_eq!(documents.iter().map(|d| d.source.line).collect::<Vec<_>>(), [5, 9]);
    let nested = "apiVersion: v1\nkind: List\nitems:\n- {apiVersion: v1, kind: List, items: []}\n";
    assert!(parse("m.yaml", nested).unwrap_err().to_string().contains("not lists"));
}

#[test]
fn an_object_that_is_not_one_is_told_so() {
    for (text, said) in [
        ("just text", "the document: it is text, wanted a mapping"),
        ("- a", "a list"),
        ("kind: Model", "apiVersion: it is missing"),
        ("apiVersion: v1\nkind: Model", "apiVersion: \"v1\" is not known"),
        ("apiVersion: mlops.seldon.io/v1alpha1\nkind: Model\nspec: {}", "metadata: it is missing"),
        ("apiVersion: mlops.seldon.io/v1alpha1\nkind: Model\nmetadata: {name: A}", "metadata.name: model name \"A\""),
        ("apiVersion: mlops.seldon.io/v1alpha1\nkind: Model\nmetadata: {name: a}", "spec: it is missing"),
        (
            "apiVersion: mlops.seldon.io/v1alpha1\nkind: Model\nmetadata: {name: a}\nspec: {}",
            "spec.storageUri: it is missing",
        ),
        ("apiVersion: mlops.seldon.io/v1alpha1\nkind: Model\nmetadata: {name: a}\nspce: {}", "spec: it is missing"),
    ] {
        let problem = parse("m.yaml", text).unwrap_err().to_string();
        assert!(problem.contains(said), "{text}: {problem}");
    }
}

#[test]
fn a_server_is_its_replicas_and_the_rest_is_noted() {
    let text = format!(
        "apiVersion: {API_VERSION}\nkind: Server\nmetadata: {{name: mlserver, namespace: ml, generation: 3}}\nspec:\n  \
         serverConfig: mlserver\n  replicas: 2\n  extraCapabilities: [gpu]\n  podSpec: {{containers: []}}\nstatus: {{loadedModels: 3}}\n"
    );
    let document = parse("s.yaml", &text).unwrap().remove(0);
    let kubernetes = Some(KubernetesMeta { namespace: "ml".into(), generation: 3 });
    let server = ServerManifest {
        name: ServerName::new("mlserver").unwrap(),
        config: Some("mlserver".into()),
        replicas: 2,
        min: 0,
        max: None,
        capabilities: vec![],
        extra_capabilities: vec!["gpu".into()],
        kubernetes,
    };
    assert_eq!(document.kind, Kind::Server(server));
    assert_eq!(document.notes.len(), 2, "{:?}", document.notes);
}

fn corpus(folder: &str) -> std::path::PathBuf {
    std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/manifests").join(folder)
}

#[test]
fn a_folder_is_read_in_the_order_of_its_names() {
    let documents = read(&[corpus("good")], &mut std::io::empty()).unwrap();
    let names: Vec<_> = documents
        .iter()
        .map(|document| match &document.kind {
            Kind::Model(definition) => definition.name.to_string(),
            Kind::Server(server) => format!("server {}", server.name),
        })
        .collect();
    assert_eq!(names, ["everything", "iris", "tfsimple1", "server mlserver", "from-json"]);
}

#[test]
fn standard_input_is_a_file_like_any_other() {
    let mut input = "apiVersion: mlops.seldon.io/v1alpha1\nkind: Modle\n".as_bytes();
    let problem = read(&["-".into()], &mut input).unwrap_err().to_string();
    assert!(problem.starts_with("standard input:2: document 1: kind: Modle"), "{problem}");
    assert!(matches!(read(&["-".into()], &mut "# nothing\n".as_bytes()), Err(ManifestError::Empty { .. })));
    assert!(matches!(read(&["-".into()], &mut &b"\xff\xfe"[..]), Err(ManifestError::Unreadable { .. })));
    assert!(matches!(
        read(&["/no/such/file".into()], &mut std::io::empty()),
        Err(ManifestError::Unreadable { problem, .. }) if problem == "there is no such file"
    ));
}

#[test]
fn input_without_end_is_not_read_to_its_end() {
    let problem = read(&["-".into()], &mut std::io::repeat(b' ')).unwrap_err().to_string();
    assert!(problem.contains("larger than 64 MiB"), "{problem}");
}

#[test]
fn one_object_said_twice_names_both_places() {
    let path = corpus("good/10-models.yaml");
    let problem = read(&[path.clone(), path], &mut std::io::empty()).unwrap_err().to_string();
    assert!(problem.starts_with("model iris is defined twice: "), "{problem}");
}

#[test]
fn every_bad_manifest_is_refused() {
    let mut seen = 0;
    for entry in std::fs::read_dir(corpus("bad")).unwrap() {
        let path = entry.unwrap().path();
        let text = std::fs::read_to_string(&path).unwrap();
        let wanted = text.lines().next().unwrap().strip_prefix("# error: ").expect("the first line says the error");
        let problem = parse("f", &text).expect_err(&path.display().to_string()).to_string();
        assert_eq!(problem, wanted, "{}", path.display());
        seen += 1;
    }
    assert!(seen > 0);
}

fn word() -> impl Generate<Value = String> {
    // Words that YAML could take for something else are what breaks a writer.
    prop_oneof![
        "[a-zA-Z0-9_./:#-]{1,12}".prop_filter("no step up", |word| !word.contains("..")),
        Just("true".to_owned()),
        Just("null".to_owned()),
        Just("1.50".to_owned()),
        Just("~".to_owned()),
        Just("0x10".to_owned()),
        Just("- a: b".to_owned()),
        Just("'\"".to_owned()),
        Just("*a & !b %c @d `e`".to_owned()),
        Just("é 模型".to_owned()),
        Just(" padded ".to_owned()),
    ]
}

prop_compose! {
    fn definition()(
        name in "[a-z]{1,8}",
        uri in word(),
        artifact_version in any::<Option<u32>>(),
        secret in proptest::option::of(word()),
        requirements in proptest::collection::vec(word(), 0..3),
        memory in proptest::option::of(1_u64..),
        companion in proptest::option::of(prop_oneof![
            (word(), word()).prop_map(|(kind, of)| Companion::Explainer { kind, of: Reference::Model(of) }),
            word().prop_map(|of| Companion::Llm { of: Reference::Pipeline(of) }),
        ]),
        parameters in proptest::collection::vec((word(), "(?s).{0,200}"), 0..3),
        (replicas, min, max) in prop_oneof![
            (1_u32..1000).prop_map(|n| (n, n / 2, 0)), (1_u32..1000).prop_map(|n| (n, 0, n + 1)), Just((0, 0, 0))],
        log_payloads in any::<bool>(),
        strategy in proptest::option::of(prop_oneof![
            Just(Strategy::Recreate),
            (1_u32.., 0_u32..).prop_map(|(a, b)| Strategy::RollingUpdate { max_surge: a, max_unavailable: b })]),
        spread in proptest::option::of(prop_oneof![Just(Spread::Servers), Just(Spread::OneServer)]),
        (priority, pinned) in any::<(Option<i32>, Option<bool>)>(),
        kubernetes in proptest::option::of(("[a-z]{1,5}", any::<i64>())),
        clean_topics_on_delete in any::<Option<bool>>(),
    ) -> Definition {
        Definition {
            name: ModelName::new(&name).unwrap(),
            spec: ModelSpec {
                uri, artifact_version, storage: secret.map(Storage::SecretName), requirements,
                memory: memory.map(Bytes), server: None, companion,
                parameters: parameters.into_iter().map(|(name, value)| Parameter { name, value }).collect(),
                runtime: None, warmup: Warmup::None,
            },
            deployment: DeploymentPatch {
                replicas: Some(Replicas { replicas, min, max, log_payloads }), strategy, spread, priority,
                pinned,
            },
            kubernetes: kubernetes.map(|(namespace, generation)| KubernetesMeta { namespace, generation }),
            passthrough: Passthrough { clean_topics_on_delete, ..Passthrough::default() },
        }
    }
}

#[test]
fn a_warm_up_is_a_word_or_a_list_of_inputs_and_comes_back() {
    let inputs = "[{name: X, datatype: FP32, shape: [1, 2], data: [0.5, 1]}]";
    for (text, wanted) in [
        ("none", Warmup::None),
        ("auto", Warmup::Auto),
        (inputs, Warmup::parse(r#"[{"name":"X","datatype":"FP32","shape":[1,2],"data":[0.5,1]}]"#).unwrap()),
    ] {
        let definition = model(&format!("warmup: {text}")).unwrap();
        assert_eq!(definition.spec.warmup, wanted, "{text}");
        let written = to_yaml(&definition);
        let Kind::Model(again) = parse("m.yaml", &written).unwrap().remove(0).kind else { panic!("{written}") };
        assert_eq!(*again, definition, "{written}");
    }
    for bad in ["maybe", "[]", "7", "[{name: X}]"] {
        let problem = problem(&format!("warmup: {bad}"));
        assert!(problem.contains("m.yaml:7: ") && problem.contains("spec.warmup"), "{problem}");
    }
}

proptest! {
    #[test]
    fn what_is_written_is_read_back(definition in definition()) {
        let yaml = to_yaml(&definition);
        let document = parse("out.yaml", &yaml)
            .map_err(|error| TestCaseError::fail(format!("{error}\n{yaml}")))?.remove(0);
        prop_assert_eq!(document.kind, Kind::Model(Box::new(definition)), "{}", yaml);
    }

    #[test]
    fn no_text_crashes_it(text in "[ -~\n\t]{0,200}", head in any::<bool>()) {
        let head = if head { "apiVersion: mlops.seldon.io/v1alpha1\nkind: Model\nmetadata: {name: a}\nspec:\n  " } else { "" };
        drop(parse("x", &format!("{head}{text}")));
    }
}
