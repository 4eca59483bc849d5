//! A hub on this machine, for tests: it speaks HTTP/1.1, one request a connection, and writes down what it was asked.
//!
//! Shared by the tests beside this file and those of the programs in `examples/tests`, which name it by its path.

use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use sha2::{Digest, Sha256};

/// What was asked.
#[derive(Clone, Debug)]
pub(crate) struct Request {
    pub(crate) method: String,
    pub(crate) path: String,
    headers: Vec<(String, String)>,
}

/// What is answered.
#[derive(Clone, Debug, Default)]
pub(crate) struct Reply {
    pub(crate) status: u16,
    pub(crate) headers: Vec<(&'static str, String)>,
    pub(crate) body: Vec<u8>,
    /// The connection ends after so many bytes of the body.
    pub(crate) cut: Option<usize>,
}

/// A server in a thread of its own, until it is dropped.
pub(crate) struct Server {
    port: u16,
    requests: Arc<Mutex<Vec<Request>>>,
    ended: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

/// A repository with files, and how a hub would show it.
#[derive(Clone, Debug)]
pub(crate) struct Repository {
    /// `org/name`.
    pub(crate) id: &'static str,
    pub(crate) is_data: bool,
    pub(crate) revision: &'static str,
    pub(crate) commit: String,
    pub(crate) files: Vec<(String, Vec<u8>)>,
}

impl Request {
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, value)| value.as_str())
    }

    /// From its first line to the empty one.
    fn read(stream: &TcpStream) -> Option<Self> {
        let mut lines =
            BufReader::new(stream).lines().map_while(Result::ok).take_while(|line| !line.is_empty());
        let first = lines.next()?;
        let mut words = first.split(' ').map(str::to_owned);
        let (method, path) = (words.next()?, words.next()?);
        let headers =
            lines.filter_map(|line| line.split_once(": ").map(|(key, value)| (key.into(), value.into())));
        Some(Self { method, path, headers: headers.collect() })
    }
}

impl Reply {
    pub(crate) fn new(status: u16, headers: &[(&'static str, &str)]) -> Self {
        let headers = headers.iter().map(|(key, value)| (*key, (*value).to_owned())).collect();
        Self { status, headers, ..Self::default() }
    }

    pub(crate) fn of(body: impl Into<Vec<u8>>) -> Self {
        Self { status: 200, body: body.into(), ..Self::default() }
    }

    /// The part of a body that a request asks for.
    pub(crate) fn part(body: &[u8], request: &Request) -> Self {
        let range = request.header("Range").and_then(|range| range.strip_prefix("bytes=")?.strip_suffix('-'));
        let Some(start) = range.and_then(|start| start.parse::<usize>().ok()) else { return Self::of(body) };
        let range = format!("bytes {start}-{}/{}", body.len() - 1, body.len());
        Self { status: 206, headers: vec![("Content-Range", range)], body: body[start..].to_vec(), cut: None }
    }

    fn send(&self, request: &Request, mut stream: &TcpStream) -> std::io::Result<()> {
        let mut head = format!("HTTP/1.1 {} Said\r\nConnection: close\r\n", self.status);
        if !self.headers.iter().any(|(key, _)| *key == "Content-Length") {
            head += &format!("Content-Length: {}\r\n", self.body.len());
        }
        for (key, value) in &self.headers {
            head += &format!("{key}: {value}\r\n");
        }
        stream.write_all((head + "\r\n").as_bytes())?;
        if request.method == "HEAD" {
            return Ok(());
        }
        stream.write_all(&self.body[..self.cut.unwrap_or(self.body.len())])
    }
}

impl Server {
    /// Answers every request with what a function makes of it.
    pub(crate) fn start(mut answer: impl FnMut(&Request) -> Reply + Send + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let (requests, ended) = (Arc::new(Mutex::new(Vec::new())), Arc::new(AtomicBool::new(false)));
        let (asked, stop) = (Arc::clone(&requests), Arc::clone(&ended));
        let serve = move || {
            for stream in listener.incoming().map_while(Result::ok) {
                if stop.load(Ordering::SeqCst) {
                    return;
                }
                let Some(request) = Request::read(&stream) else { continue };
                asked.lock().unwrap().push(request.clone());
                // Who has heard enough may go.
                let _ = answer(&request).send(&request, &stream);
            }
        };
        Self { port, requests, ended, thread: Some(std::thread::spawn(serve)) }
    }

    /// A hub with these repositories. Its large files lie on another host, as they do there.
    pub(crate) fn of(repositories: Vec<Repository>) -> Self {
        Self::with(repositories, |_| None)
    }

    /// The same where a function may answer first.
    pub(crate) fn with(
        repositories: Vec<Repository>,
        mut first: impl FnMut(&Request) -> Option<Reply> + Send + 'static,
    ) -> Self {
        Self::start(move |request| {
            let found = || repositories.iter().find_map(|repository| repository.answer(request));
            first(request).or_else(found).unwrap_or_else(|| not_found("RepoNotFound"))
        })
    }

    pub(crate) fn endpoint(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    /// What was asked since the last time.
    pub(crate) fn requests(&self) -> Vec<Request> {
        std::mem::take(&mut self.requests.lock().unwrap())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::SeqCst);
        // The thread waits for a connection; this is the last.
        let _ = TcpStream::connect(("127.0.0.1", self.port));
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

pub(crate) fn not_found(code: &str) -> Reply {
    Reply::new(404, &[("X-Error-Code", code)])
}

/// The name under which a hub knows a large file.
pub(crate) fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

impl Repository {
    pub(crate) fn model(id: &'static str, files: &[(&str, &[u8])]) -> Self {
        let files = files.iter().map(|(name, content)| ((*name).to_owned(), content.to_vec())).collect();
        Self {
            id,
            is_data: false,
            revision: "main",
            commit: "0123456789abcdef0123456789abcdef01234567".into(),
            files,
        }
    }

    pub(crate) fn data(id: &'static str, files: &[(&str, &[u8])]) -> Self {
        Self { is_data: true, ..Self::model(id, files) }
    }

    pub(crate) fn answer(&self, request: &Request) -> Option<Reply> {
        let (kind, prefix) = if self.is_data { ("datasets", "/datasets") } else { ("models", "") };
        if let Some(revision) = request.path.strip_prefix(&format!("/api/{kind}/{}/revision/", self.id)) {
            return Some(self.listing(revision));
        }
        let file = |prefix: &str| Some(request.path.strip_prefix(prefix)?.replace("%20", " "));
        if let Some(file) = file(&format!("{prefix}/{}/resolve/{}/", self.id, self.commit)) {
            return Some(self.resolve(&file, request));
        }
        let content = self.content(&file(&format!("/cdn/{}/", self.id))?)?;
        Some(Reply::part(content, request))
    }

    fn listing(&self, revision: &str) -> Reply {
        if revision != self.revision && revision != self.commit {
            return not_found("RevisionNotFound");
        }
        let names: Vec<String> =
            self.files.iter().map(|(name, _)| format!(r#"{{"rfilename": {name:?}}}"#)).collect();
        Reply::of(format!(r#"{{"sha": {:?}, "siblings": [{}]}}"#, self.commit, names.join(", ")))
    }

    fn resolve(&self, file: &str, request: &Request) -> Reply {
        let Some(content) = self.content(file) else { return not_found("EntryNotFound") };
        if file.ends_with(".safetensors") || file.ends_with(".bin") {
            let host = request.header("Host").unwrap().replace("127.0.0.1", "localhost");
            let headers = [
                ("Location", format!("http://{host}/cdn/{}/{}", self.id, file.replace(' ', "%20"))),
                ("X-Linked-Etag", format!("{:?}", sha256(content))),
                ("X-Linked-Size", content.len().to_string()),
            ];
            return Reply { status: 302, headers: headers.into(), ..Reply::default() };
        }
        let mut reply = Reply::part(content, request);
        reply.headers.push(("ETag", format!("W/{:?}", &sha256(content)[..40])));
        reply
    }

    fn content(&self, file: &str) -> Option<&[u8]> {
        self.files.iter().find(|(name, _)| name == file).map(|(_, content)| content.as_slice())
    }
}
