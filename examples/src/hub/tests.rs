//! Fetching against a hub on this machine: whole, from the cache, broken off and taken up again, refused, and hostile.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs;
use std::path::Path;
use std::time::Duration;

use tempfile::TempDir;

use super::choose::{self, Weights};
use super::server::{Reply, Repository, Request, Server, not_found, sha256};
use super::{Hub, HubError, HubSettings, Patience, RepoName, Wanted};

const INDEX: &str = r#"{"weight_map": {"a": "model-1.safetensors", "b": "part/model-2.safetensors", "c": "model-1.safetensors"}}"#;
const SHARDS: [&str; 2] = ["model-1.safetensors", "part/model-2.safetensors"];

/// More than one buffer, and no two places alike.
fn noise(bytes: usize) -> Vec<u8> {
    (0..bytes as u32).map(|place| (place.wrapping_mul(0x9E37_79B9) >> 24) as u8).collect()
}

fn llama() -> Repository {
    let (first, second) = (noise(3 << 20), noise(1000));
    Repository::model(
        "org/llama",
        &[
            ("README.md", b"read me"),
            ("config.json", b"{}"),
            ("tokenizer.json", b"a tokenizer"),
            ("special_tokens_map.json", b"{ }"),
            ("model.safetensors.index.json", INDEX.as_bytes()),
            (SHARDS[0], &first),
            (SHARDS[1], &second),
            ("pytorch_model.bin", b"the same again"),
        ],
    )
}

/// What a model's folder holds after it was fetched.
fn wanted_of_llama() -> BTreeSet<String> {
    let small = ["config.json", "tokenizer.json", "special_tokens_map.json", "model.safetensors.index.json"];
    small.into_iter().chain(SHARDS).map(str::to_owned).collect()
}

/// A cache and the settings for a server.
struct Home(TempDir);

impl Home {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn settings(&self, endpoint: String) -> HubSettings {
        let patience =
            Patience { attempts: 3, pause: Duration::from_millis(1), silence: Duration::from_secs(10) };
        HubSettings { cache: self.0.path().join("hub"), endpoint, token: None, offline: false, patience }
    }

    fn hub(&self, server: &Server) -> Hub {
        Hub::new(self.settings(server.endpoint()))
    }

    /// Every file below the folder of the cache's parent, so that one that escaped is seen too.
    fn files(&self) -> BTreeSet<String> {
        let mut files = BTreeSet::new();
        below(self.0.path(), self.0.path(), &mut files);
        files
    }

    /// Contents under their final names.
    fn blobs(&self) -> usize {
        let is_blob = |file: &&String| file.contains("/blobs/") && !file.ends_with(".incomplete");
        self.files().iter().filter(is_blob).count()
    }

    fn partial(&self) -> Option<String> {
        self.files().into_iter().find(|file| file.ends_with(".incomplete"))
    }
}

fn below(root: &Path, folder: &Path, files: &mut BTreeSet<String>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            below(root, &path, files);
        } else {
            files.insert(path.strip_prefix(root).unwrap().to_str().unwrap().to_owned());
        }
    }
}

fn name(text: &str) -> RepoName {
    RepoName::of_model(Path::new(text)).unwrap()
}

fn model(hub: &Hub) -> Result<std::path::PathBuf, HubError> {
    hub.fetch(&name("org/llama"), Wanted::Model)
}

#[track_caller]
fn refused<T: std::fmt::Debug>(result: Result<T, HubError>, pieces: &[&str]) {
    let message = result.unwrap_err().to_string();
    for piece in pieces {
        assert!(message.contains(piece), "`{piece}` is missing in: {message}");
    }
}

fn count(requests: &[Request], method: &str, path: &str) -> usize {
    requests.iter().filter(|request| request.method == method && request.path.contains(path)).count()
}

#[test]
fn a_model_comes_whole_and_only_what_is_needed_of_it() {
    let (server, home) = (Server::of(vec![llama()]), Home::new());
    let hub = Hub::new(HubSettings { token: Some("secret".into()), ..home.settings(server.endpoint()) });
    let folder = model(&hub).unwrap();
    let mut found = BTreeSet::new();
    below(&folder, &folder, &mut found);
    assert_eq!(found, wanted_of_llama());
    for (file, content) in llama().files.iter().filter(|(file, _)| found.contains(file)) {
        assert!(fs::read(folder.join(file)).unwrap() == *content, "{file}");
    }
    // Where Hugging Face's libraries look: contents by hash, commits of links to them, branches.
    let repository = home.0.path().join("hub/models--org--llama");
    assert_eq!(folder, repository.join("snapshots").join(llama().commit));
    assert_eq!(fs::read_to_string(repository.join("refs/main")).unwrap(), llama().commit);
    let shard = repository.join("blobs").join(sha256(&noise(1000)));
    assert_eq!(fs::read(&shard).unwrap(), noise(1000));
    assert_eq!(fs::canonicalize(folder.join(SHARDS[1])).unwrap(), fs::canonicalize(shard).unwrap());
    assert_eq!((home.blobs(), home.partial()), (6, None));
    // The token is the hub's business and nobody else's.
    for request in server.requests() {
        let expected = (!request.path.starts_with("/cdn/")).then_some("Bearer secret");
        assert_eq!(request.header("Authorization"), expected, "{}", request.path);
    }
}

#[test]
fn what_is_here_is_not_fetched_again() {
    let (server, home) = (Server::of(vec![llama()]), Home::new());
    let hub = home.hub(&server);
    let folder = model(&hub).unwrap();
    server.requests();
    // Whether the branch has moved on is one question; a commit never does.
    assert_eq!(model(&hub).unwrap(), folder);
    assert_eq!(server.requests().len(), 1);
    let commit = name(&format!("org/llama@{}", llama().commit));
    assert_eq!(hub.fetch(&commit, Wanted::Model).unwrap(), folder);
    assert_eq!(server.requests().len(), 0);
    // A content that is shared by two commits is linked, not fetched.
    fs::remove_dir_all(&folder).unwrap();
    assert_eq!(hub.fetch(&commit, Wanted::Model).unwrap(), folder);
    let requests = server.requests();
    assert_eq!((count(&requests, "HEAD", "resolve"), count(&requests, "GET", "resolve")), (6, 0));
    // Without a hub the cache has to do.
    drop(server);
    assert_eq!(model(&hub).unwrap(), folder);
    fs::remove_file(fs::canonicalize(folder.join(SHARDS[1])).unwrap()).unwrap();
    refused(model(&hub), &["cannot be reached", "HF_ENDPOINT"]);
}

#[test]
fn a_content_that_was_removed_or_cut_comes_again() {
    let (server, home) = (Server::of(vec![llama()]), Home::new());
    let hub = home.hub(&server);
    let folder = model(&hub).unwrap();
    let blob = |file: &str| fs::canonicalize(folder.join(file)).unwrap();
    fs::remove_file(blob("config.json")).unwrap();
    let commit = name(&format!("org/llama@{}", llama().commit));
    assert_eq!(fs::read(hub.fetch(&commit, Wanted::Model).unwrap().join("config.json")).unwrap(), b"{}");
    // A content of the wrong length that no snapshot has yet.
    fs::write(blob("tokenizer.json"), "cut").unwrap();
    fs::remove_file(folder.join("tokenizer.json")).unwrap();
    model(&hub).unwrap();
    assert_eq!(fs::read(folder.join("tokenizer.json")).unwrap(), b"a tokenizer");
}

#[test]
fn a_description_needs_no_weights_and_an_adapter_its_own() {
    let files: [(&str, &[u8]); 4] = [
        ("adapter_config.json", b"{}"),
        ("adapter_model.safetensors", b"factors"),
        ("adapter_model.bin", b"factors again"),
        ("training_args.bin", b"a pickle"),
    ];
    let (server, home) = (Server::of(vec![llama(), Repository::model("org/adapter", &files)]), Home::new());
    let hub = home.hub(&server);
    hub.fetch(&name("org/llama"), Wanted::Description).unwrap();
    assert_eq!(home.blobs(), 3);
    assert_eq!(count(&server.requests(), "GET", "/cdn/"), 0);
    let folder = hub.fetch(&name("org/adapter"), Wanted::Adapter).unwrap();
    let mut found = BTreeSet::new();
    below(&folder, &folder, &mut found);
    assert_eq!(found, ["adapter_config.json", "adapter_model.safetensors"].map(str::to_owned).into());
    refused(
        hub.fetch(&name("org/adapter"), Wanted::Model),
        &["org/adapter", "--adapter", "training_args.bin"],
    );
    refused(
        hub.fetch(&name("org/llama"), Wanted::Adapter),
        &["org/llama", "no PEFT adapter", "adapter_config.json"],
    );
}

#[test]
fn one_file_of_a_data_set_is_fetched_with_its_folders() {
    let files: [(&str, &[u8]); 2] =
        [("some clues/all of them.csv", b"question,answer\n"), ("other.csv", b"x")];
    // As it stands in an address.
    let repository = Repository { revision: "refs%2Fpr%2F1", ..Repository::data("org/clues", &files) };
    let (server, home) = (Server::of(vec![repository]), Home::new());
    let hub = home.hub(&server);
    let of = |text: &str| RepoName::of_data(Path::new(text)).unwrap().unwrap();
    let (name, file) = of("hub:org/clues/some clues/all of them.csv@refs/pr/1");
    let folder = hub.fetch(&name, Wanted::File(&file)).unwrap();
    assert_eq!(fs::read(folder.join(&file)).unwrap(), b"question,answer\n");
    assert_eq!(home.blobs(), 1);
    assert!(home.files().contains("hub/datasets--org--clues/refs/refs/pr/1"));
    let (name, file) = of("hub:org/clues/clues.csv@refs/pr/1");
    refused(hub.fetch(&name, Wanted::File(&file)), &["`clues.csv`", "other.csv", "/datasets/org/clues"]);
}

/// A hub whose large files end after so many bytes, one number an answer; ranges that were asked for.
fn breaking(cuts: Vec<usize>) -> Server {
    let (content, mut cuts) = (noise(3 << 20), cuts.into_iter());
    Server::with(vec![llama()], move |request| {
        let is_first = request.path.ends_with(SHARDS[0]) && request.path.starts_with("/cdn/");
        let cut = is_first.then(|| cuts.next())??;
        Some(Reply { cut: Some(cut), ..Reply::part(&content, request) })
    })
}

fn ranges(server: &Server) -> Vec<Option<String>> {
    let of_first = |request: &Request| request.path.ends_with(SHARDS[0]) && request.path.starts_with("/cdn/");
    let requests = server.requests();
    requests
        .iter()
        .filter(|request| of_first(request))
        .map(|request| request.header("Range").map(str::to_owned))
        .collect()
}

#[test]
fn a_broken_connection_is_taken_up_where_it_broke() {
    let (server, home) = (breaking(vec![1 << 20, 500_000, 0, 1]), Home::new());
    let folder = model(&home.hub(&server)).unwrap();
    assert!(fs::read(folder.join(SHARDS[0])).unwrap() == noise(3 << 20));
    let from = |bytes: usize| Some(format!("bytes={bytes}-"));
    let first = 1 << 20;
    let expected = [None, from(first), from(first + 500_000), from(first + 500_000), from(first + 500_001)];
    assert_eq!(ranges(&server), expected);
    assert_eq!(home.partial(), None);
}

#[test]
fn what_came_is_kept_for_the_next_time_and_never_under_its_final_name() {
    let (server, home) = (breaking(vec![1 << 20, 0, 0]), Home::new());
    let hub = home.hub(&server);
    refused(model(&hub), &[SHARDS[0], "1048576 of 3145728 bytes", "run the command again"]);
    let partial = home.0.path().join(home.partial().unwrap());
    assert_eq!(fs::metadata(&partial).unwrap().len(), 1 << 20);
    assert!(!home.files().iter().any(|file| file.ends_with(SHARDS[0])));
    assert!(!home.files().contains("hub/models--org--llama/refs/main"), "a branch is noted when all is here");
    refused(
        Hub::new(HubSettings { offline: true, ..home.settings(server.endpoint()) })
            .fetch(&name("org/llama"), Wanted::Model),
        &["org/llama", "HF_HUB_OFFLINE"],
    );
    server.requests();
    let folder = model(&hub).unwrap();
    assert!(fs::read(folder.join(SHARDS[0])).unwrap() == noise(3 << 20));
    assert_eq!(ranges(&server), [Some("bytes=1048576-".to_owned())]);
    assert!(!partial.exists());
}

#[test]
fn a_start_that_is_wrong_or_a_server_without_ranges_means_from_the_beginning() {
    // The start that is here is of another file: only the hash tells.
    let (server, home) = (Server::of(vec![llama()]), Home::new());
    let blobs = home.0.path().join("hub/models--org--llama/blobs");
    fs::create_dir_all(&blobs).unwrap();
    let partial = blobs.join(format!("{}.incomplete", sha256(&noise(3 << 20))));
    fs::write(&partial, "something else").unwrap();
    refused(model(&home.hub(&server)), &[SHARDS[0], "SHA-256", "thrown away"]);
    assert!(!partial.exists());
    let folder = model(&home.hub(&server)).unwrap();
    assert!(fs::read(folder.join(SHARDS[0])).unwrap() == noise(3 << 20));

    // Longer than the file can be, and then a server that sends all of it whatever is asked for.
    let home = Home::new();
    let content = noise(3 << 20);
    let server = Server::with(vec![llama()], move |request| {
        let is_first = request.path.starts_with("/cdn/") && request.path.ends_with(SHARDS[0]);
        is_first.then(|| Reply::of(content.clone()))
    });
    let blobs = home.0.path().join("hub/models--org--llama/blobs");
    fs::create_dir_all(&blobs).unwrap();
    let partial = blobs.join(format!("{}.incomplete", sha256(&noise(3 << 20))));
    fs::write(&partial, &noise(3 << 20)[..1000]).unwrap();
    let folder = model(&home.hub(&server)).unwrap();
    assert!(fs::read(folder.join(SHARDS[0])).unwrap() == noise(3 << 20));
    assert_eq!(ranges(&server), [Some("bytes=1000-".to_owned())]);
}

#[test]
fn two_programs_fetch_a_file_once() {
    let (server, home) = (Server::of(vec![llama()]), Home::new());
    let fetch = || model(&home.hub(&server)).unwrap();
    let folders = std::thread::scope(|scope| {
        [scope.spawn(fetch), scope.spawn(fetch)].map(|thread| thread.join().unwrap())
    });
    assert_eq!(folders[0], folders[1]);
    assert_eq!(count(&server.requests(), "GET", "/cdn/"), 2);
    assert!(fs::read(folders[0].join(SHARDS[0])).unwrap() == noise(3 << 20));
}

#[test]
fn refusals_say_what_to_do() {
    let answers: [(Reply, Option<&str>, &[&str]); 11] = [
        (
            Reply::new(401, &[("X-Error-Code", "GatedRepo"), ("X-Error-Message", "Access is restricted")]),
            None,
            &["accept them at http", "/org/llama", "set HF_TOKEN", "Access is restricted"],
        ),
        (
            Reply::new(403, &[("X-Error-Code", "GatedRepo")]),
            Some("secret"),
            &["accept them at", "account whose token is set"],
        ),
        (
            Reply::new(401, &[("X-Error-Code", "RepoNotFound")]),
            None,
            &["org/llama is neither a folder", "HF_TOKEN"],
        ),
        (Reply::new(401, &[]), None, &["neither a folder", "check the name"]),
        (Reply::new(401, &[]), Some("secret"), &["refuses the access token", "status 401"]),
        (Reply::new(403, &[]), Some("secret"), &["refuses the access token", "status 403"]),
        (not_found("RepoNotFound"), Some("secret"), &["neither a folder"]),
        (not_found("RevisionNotFound"), None, &["no revision `main`", "/org/llama"]),
        (Reply::new(418, &[]), None, &["status 418", "HF_ENDPOINT"]),
        (Reply::new(503, &[("X-Error-Message", "later")]), None, &["status 503", "later", "try again"]),
        (Reply::of("<html>"), None, &["not an answer of a hub", "HF_ENDPOINT"]),
    ];
    for (reply, token, pieces) in answers {
        let (attempts, home) = (if reply.status == 503 { 3 } else { 1 }, Home::new());
        let server = Server::start(move |_| reply.clone());
        let hub =
            Hub::new(HubSettings { token: token.map(str::to_owned), ..home.settings(server.endpoint()) });
        refused(model(&hub), pieces);
        assert_eq!(server.requests().len(), attempts, "{pieces:?}");
        assert!(home.files().is_empty());
    }
}

#[test]
fn a_repository_may_be_shown_and_its_files_refused() {
    let home = Home::new();
    let server = Server::with(vec![llama()], |request| {
        request.path.contains("/resolve/").then(|| Reply::new(403, &[("X-Error-Code", "GatedRepo")]))
    });
    refused(model(&home.hub(&server)), &["accept them at", "/org/llama"]);
    assert_eq!(home.blobs(), 0);
}

#[test]
fn offline_nothing_is_asked() {
    let (server, home) = (Server::of(vec![llama()]), Home::new());
    let offline = Hub::new(HubSettings { offline: true, ..home.settings(server.endpoint()) });
    refused(model(&offline), &["org/llama", "HF_HUB_OFFLINE", "the repository"]);
    home.hub(&server).fetch(&name("org/llama"), Wanted::Description).unwrap();
    server.requests();
    assert!(offline.fetch(&name("org/llama"), Wanted::Description).is_ok());
    refused(model(&offline), &["org/llama", "HF_HUB_OFFLINE", "weights"]);
    refused(offline.fetch(&name("org/llama@v2"), Wanted::Model), &["org/llama@v2", "HF_HUB_OFFLINE"]);
    let folder = model(&home.hub(&server)).unwrap();
    server.requests();
    assert_eq!(model(&offline).unwrap(), folder);
    // An index without one of its shards is no model.
    fs::remove_file(folder.join(SHARDS[1])).unwrap();
    refused(model(&offline), &[SHARDS[1], "HF_HUB_OFFLINE"]);
    assert_eq!(server.requests().len(), 0);
}

/// A hub that answers some requests otherwise.
fn twisted(is_meant: fn(&Request) -> bool, twist: fn(Reply) -> Reply) -> Server {
    let repository = llama();
    Server::with(vec![llama()], move |request| {
        is_meant(request).then(|| twist(repository.answer(request).unwrap()))
    })
}

fn set(mut reply: Reply, name: &'static str, value: &str) -> Reply {
    reply.headers.retain(|(key, _)| *key != name);
    if !value.is_empty() {
        reply.headers.push((name, value.to_owned()));
    }
    reply
}

fn is_listing(request: &Request) -> bool {
    request.path.starts_with("/api/")
}

fn is_head_of_shard(request: &Request) -> bool {
    request.method == "HEAD" && request.path.ends_with(SHARDS[0])
}

fn is_head_of_config(request: &Request) -> bool {
    request.method == "HEAD" && request.path.ends_with("/config.json")
}

fn is_shard(request: &Request) -> bool {
    request.path.starts_with("/cdn/") && request.path.ends_with(SHARDS[0])
}

fn replaced(mut reply: Reply, from: &str, to: &str) -> Reply {
    reply.body = String::from_utf8(reply.body).unwrap().replace(from, to).into();
    reply
}

/// Which answers are twisted, how, and what the error says.
type Hostile = (fn(&Request) -> bool, fn(Reply) -> Reply, &'static [&'static str]);

#[test]
fn hostile_answers_leave_nothing_behind() {
    let hostile: [Hostile; 14] = [
        (
            is_listing,
            |reply| replaced(reply, "README.md", "../../../outside"),
            &["../../../outside", "inside its folder"],
        ),
        (
            is_listing,
            |reply| replaced(reply, "README.md", "/etc/outside"),
            &["/etc/outside", "inside its folder"],
        ),
        (is_listing, |reply| replaced(reply, "README.md", r"..\\outside"), &["inside its folder"]),
        (
            is_listing,
            |reply| replaced(reply, "0123456789", "../../"),
            &["its commit is called", "HF_ENDPOINT"],
        ),
        (
            is_head_of_shard,
            |reply| set(reply, "X-Linked-Etag", "\"../../outside\""),
            &["../../outside", "HF_ENDPOINT"],
        ),
        (is_head_of_shard, |reply| set(reply, "X-Linked-Etag", "\"\""), &["the content is called ``"]),
        (is_head_of_shard, |reply| set(reply, "X-Linked-Size", "-1"), &["the length is `-1`"]),
        (is_head_of_config, |reply| set(reply, "ETag", ""), &["neither X-Linked-Etag nor ETag"]),
        (
            is_head_of_config,
            |_| {
                Reply::new(
                    302,
                    &[(
                        "Location",
                        "/org/llama/resolve/0123456789abcdef0123456789abcdef01234567/config.json",
                    )],
                )
            },
            &["without an end"],
        ),
        (is_head_of_shard, |reply| set(reply, "X-Linked-Size", "1000"), &["more than the 1000 bytes"]),
        (is_head_of_shard, |reply| set(reply, "X-Linked-Size", "4000000"), &["3145728 of 4000000 bytes"]),
        (is_shard, |_| Reply::of(noise(1000)), &["1000 of 3145728 bytes", "ended early"]),
        (is_shard, |reply| Reply { body: vec![0; 3 << 20], ..reply }, &["SHA-256"]),
        (
            is_shard,
            |reply| set(Reply { status: 206, ..reply }, "Content-Range", "bytes 5-3145727/3145728"),
            &["asked for bytes from 0 on", "bytes 5-"],
        ),
    ];
    for (is_meant, twist, pieces) in hostile {
        let (server, home) = (twisted(is_meant, twist), Home::new());
        refused(model(&home.hub(&server)), pieces);
        let files = home.files();
        assert!(files.iter().all(|file| file.starts_with("hub/")), "{pieces:?}: {files:?}");
        assert!(!files.iter().any(|file| file.ends_with(SHARDS[0])), "{pieces:?}: {files:?}");
        assert!(!files.contains(&format!("hub/models--org--llama/blobs/{}", sha256(&noise(3 << 20)))));
        assert!(!files.contains("hub/models--org--llama/refs/main"));
    }
}

#[test]
fn an_index_may_name_only_files_of_its_repository() {
    for (shard, pieces) in
        [("../../outside", ["outside this folder"]), ("gone.safetensors", ["no file `gone.safetensors`"])]
    {
        let mut repository = llama();
        repository.files.iter_mut().filter(|(file, _)| file.ends_with(".index.json")).for_each(
            |(_, content)| {
                *content = INDEX.replace(SHARDS[1], shard).into_bytes();
            },
        );
        let (server, home) = (Server::of(vec![repository]), Home::new());
        refused(model(&home.hub(&server)), &pieces);
        assert!(home.files().iter().all(|file| file.starts_with("hub/")));
    }
}

#[test]
fn one_form_of_the_weights_is_taken() {
    let weights = |files: &[&str]| {
        let files = ["config.json"].iter().chain(files).map(|&file| file.to_owned());
        choose::weights(&files.collect())
    };
    let files = |names: &[&str]| Some(Weights::Files(names.iter().map(|&name| name.to_owned()).collect()));
    let index = |name: &str| Some(Weights::Index(name.to_owned()));
    assert_eq!(weights(&["model.safetensors", "pytorch_model.bin", "x.gguf"]), files(&["model.safetensors"]));
    assert_eq!(
        weights(&["model.safetensors.index.json", "model.safetensors", "pytorch_model.bin.index.json"]),
        index("model.safetensors.index.json")
    );
    assert_eq!(
        weights(&["pytorch_model.bin.index.json", "params.json"]),
        index("pytorch_model.bin.index.json")
    );
    assert_eq!(
        weights(&["consolidated.01.pth", "consolidated.00.pth", "params.json", "checklist.chk"]),
        files(&["consolidated.00.pth", "consolidated.01.pth"])
    );
    assert_eq!(weights(&["a.gguf", "config.json"]), files(&["a.gguf"]));
    assert_eq!(weights(&["a.gguf", "b.gguf"]), None);
    assert_eq!(weights(&["consolidated.00.pth"]), None);
    assert_eq!(choose::weights(&["model.safetensors".to_owned()].into()), None);
}

#[test]
fn names_are_told_from_paths() {
    let parts = |text: &str| {
        RepoName::of_model(Path::new(text)).map(|name| (name.id().to_owned(), name.revision().to_owned()))
    };
    let part = |id: &str, revision: &str| Some((id.to_owned(), revision.to_owned()));
    assert_eq!(parts("meta-llama/Llama-2-7b-hf"), part("meta-llama/Llama-2-7b-hf", "main"));
    assert_eq!(parts("org/name@refs/pr/3"), part("org/name", "refs/pr/3"));
    for path in [
        "name",
        "./org/name",
        "../name",
        "/org/name",
        "org/name/",
        "a/b/c",
        "~/name",
        "org/na me",
        "org/name@",
        "org/name@../x",
        "",
    ] {
        assert_eq!(parts(path), None, "{path}");
    }
    let data = |text: &str| RepoName::of_data(Path::new(text));
    let (name, file) = data("hub:org/clues/train/0.parquet@v1.0").unwrap().unwrap();
    assert_eq!((name.id(), name.revision(), file.as_str()), ("org/clues", "v1.0", "train/0.parquet"));
    assert_eq!(data("org/clues/train.csv").unwrap(), None);
    for wrong in [
        "hub:org/clues",
        "hub:org/clues/../x",
        "hub:org/clues//x",
        "hub:/clues/x",
        "hub:org/clues/x@",
        "hub:",
    ] {
        refused(data(wrong), &[wrong, "hub:org/name/file@revision"]);
    }
}

#[test]
fn the_environment_is_read_as_hugging_face_reads_it() {
    let home = tempfile::tempdir().unwrap();
    fs::write(home.path().join("token"), " from-file\n").unwrap();
    let of = |variables: &[(&str, &str)]| {
        let variables: Vec<(String, OsString)> =
            variables.iter().map(|(key, value)| ((*key).to_owned(), OsString::from(value))).collect();
        HubSettings::from_variables(move |name| {
            variables.iter().find(|(key, _)| key == name).map(|(_, value)| value.clone())
        })
    };
    let folder = home.path().to_str().unwrap();
    let cache = |variables: &[(&str, &str)]| of(variables).unwrap().cache;
    assert_eq!(cache(&[("HOME", "/h")]), Path::new("/h/.cache/huggingface/hub"));
    assert_eq!(cache(&[("HOME", "/h"), ("XDG_CACHE_HOME", "/x")]), Path::new("/x/huggingface/hub"));
    assert_eq!(cache(&[("HOME", "/h"), ("HF_HOME", "/f")]), Path::new("/f/hub"));
    assert_eq!(cache(&[("HF_HOME", "/f"), ("HF_HUB_CACHE", "/c")]), Path::new("/c"));
    refused(of(&[]), &["HF_HOME"]);

    let settings = of(&[("HF_HOME", folder), ("HF_ENDPOINT", "https://mirror.example/")]).unwrap();
    assert_eq!((settings.endpoint.as_str(), settings.offline), ("https://mirror.example", false));
    assert_eq!(settings.token.as_deref(), Some("from-file"));
    let settings =
        of(&[("HF_HOME", folder), ("HF_TOKEN", "from-variable"), ("HF_HUB_OFFLINE", "YES")]).unwrap();
    assert_eq!((settings.token.as_deref(), settings.offline), (Some("from-variable"), true));
    assert_eq!(settings.endpoint, "https://huggingface.co");
    let settings = of(&[("HF_HOME", "/f"), ("HF_TOKEN", " "), ("HF_HUB_OFFLINE", "0")]).unwrap();
    assert_eq!((settings.token, settings.offline), (None, false));
    refused(of(&[("HF_HOME", "/f"), ("HF_ENDPOINT", "huggingface.co")]), &["HF_ENDPOINT", "huggingface.co"]);
}
