//! One file on its way into the cache.
//!
//! Its bytes are collected under a temporary name that Hugging Face's libraries know as well, so that whichever of them comes
//! next goes on where the last one broke off. The file gets its final name, which is its hash, once it has the length that was
//! announced and, where the hash is one of the content (large files: SHA-256), that hash too. What it refuses: a server that
//! begins at another byte than it was asked to.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, ErrorKind, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use indicatif::{ProgressBar, ProgressStyle};
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use sha2::{Digest, Sha256};
use ureq::Body;
use ureq::http::{Response, StatusCode};

use super::name::is_hash;
use super::snapshot::Snapshot;
use super::{Hub, HubError, Patience, header, origin};
use crate::bytes as readable;

/// Addresses that one file leads through at most.
const MOST_REDIRECTS: usize = 5;
const BUFFER_BYTES: usize = 1 << 20;
/// Hexadecimal digits of a SHA-256.
const SHA256_DIGITS: usize = 64;
/// What is written as it is in the path of an address.
const PATH: &AsciiSet = &NON_ALPHANUMERIC.remove(b'/').remove(b'-').remove(b'_').remove(b'.').remove(b'~');

/// A file that is to come.
pub(super) struct Download<'a> {
    snapshot: &'a Snapshot<'a>,
    file: &'a str,
    url: String,
}

/// What was announced of a file.
struct Announced {
    /// The name of its content.
    hash: String,
    bytes: u64,
}

/// A file's first bytes.
struct Partial {
    path: PathBuf,
    file: File,
    length: u64,
    /// Of these bytes, if the content's hash is known.
    hash: Option<Sha256>,
}

impl<'a> Download<'a> {
    pub(super) fn new(snapshot: &'a Snapshot<'a>, file: &'a str) -> Self {
        let endpoint = &snapshot.hub.settings.endpoint;
        let (repo, commit) = (snapshot.name.repo().url(), snapshot.commit());
        let url = format!("{endpoint}/{repo}/resolve/{commit}/{}", utf8_percent_encode(file, PATH));
        Self { snapshot, file, url }
    }

    /// Brings the file into the cache, unless its content is there already, and links it into the snapshot.
    pub(super) fn run(&self) -> Result<(), HubError> {
        let announced = self.hub().patiently(|| self.announced())?;
        let blob = self.hub().cache.repo(self.snapshot.name.repo()).blob_path(&announced.hash);
        let _lock = self.lock(&announced)?;
        // Another process may have been faster.
        if fs::metadata(&blob).map(|blob| blob.len()).ok() != Some(announced.bytes) {
            self.bring(&announced, &blob)?;
        }
        self.link(&blob).map_err(|source| HubError::cache(&blob, source))
    }

    fn hub(&self) -> &Hub {
        self.snapshot.hub
    }

    /// Asks for length and hash, which stand in the hub's own answer: where it leads to another host, that one does not know
    /// them.
    fn announced(&self) -> Result<Announced, HubError> {
        let mut url = self.url.clone();
        for _ in 0..MOST_REDIRECTS {
            let request = self.hub().agent.head(&url).config().max_redirects(0).build();
            let response = self.hub().call(request, &url)?;
            self.hub().check(self.snapshot.name, &url, &response)?;
            let is_told = header(&response, "X-Linked-Etag").is_some();
            match header(&response, "Location").filter(|_| response.status().is_redirection() && !is_told) {
                Some(path) if path.starts_with('/') => url = format!("{}{path}", origin(&url)),
                Some(address) => url = address.to_owned(),
                None => return self.announced_by(&response),
            }
        }
        Err(self.answer("it leads from one address to the next without an end".into()))
    }

    fn announced_by(&self, response: &Response<Body>) -> Result<Announced, HubError> {
        let either = |names: [&'static str; 2]| {
            let found = names.iter().find_map(|name| header(response, name));
            found.ok_or_else(|| self.answer(format!("it has neither {} nor {}", names[0], names[1])))
        };
        let hash = either(["X-Linked-Etag", "ETag"])?;
        let hash = hash.strip_prefix("W/").unwrap_or(hash).trim_matches('"');
        if !is_hash(hash) {
            return Err(self.answer(format!("the content is called `{}`", hash.escape_debug())));
        }
        let length = either(["X-Linked-Size", "Content-Length"])?;
        let bytes =
            length.parse().map_err(|_| self.answer(format!("the length is `{}`", length.escape_debug())))?;
        Ok(Announced { hash: hash.to_owned(), bytes })
    }

    /// Keeps other processes from the same content, the way `huggingface_hub` does.
    fn lock(&self, announced: &Announced) -> Result<File, HubError> {
        let folder = self.hub().cache.path().join(".locks").join(self.snapshot.name.repo().folder_name());
        let path = folder.join(format!("{}.lock", announced.hash));
        let fault = |source: io::Error| HubError::cache(&path, source);
        fs::create_dir_all(&folder).map_err(fault)?;
        let file = OpenOptions::new().create(true).truncate(false).write(true).open(&path).map_err(fault)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                eprintln!("waiting   for another program that fetches {}", self.file);
                file.lock().map_err(fault)?;
            }
            // Some network drives know no locks.
            Err(TryLockError::Error(error)) if error.kind() == ErrorKind::Unsupported => {}
            Err(TryLockError::Error(error)) => return Err(fault(error)),
        }
        Ok(file)
    }

    /// Brings the content under its final name.
    fn bring(&self, announced: &Announced, blob: &Path) -> Result<(), HubError> {
        let mut partial = Partial::open(blob, announced)?;
        let style = ProgressStyle::with_template(
            "fetching  {msg} {bar:30} {bytes}/{total_bytes}  {bytes_per_sec}  {eta} left",
        );
        let bar = ProgressBar::new(announced.bytes).with_message(self.file.to_owned());
        // The template is a constant that indicatif takes; without it the bar would only look plainer.
        let bar = if let Ok(style) = style { bar.with_style(style) } else { bar };
        let done = self.receive_all(announced, &mut partial, &bar);
        bar.finish_and_clear();
        done?;
        partial.finish(blob, announced, self.file)?;
        eprintln!("fetched   {} ({}) of {}", self.file, readable(announced.bytes), self.snapshot.name);
        Ok(())
    }

    /// Asks for what is missing until nothing is; an attempt that brought something does not count against the patience.
    fn receive_all(
        &self,
        announced: &Announced,
        partial: &mut Partial,
        bar: &ProgressBar,
    ) -> Result<(), HubError> {
        let Patience { attempts, pause, .. } = self.hub().settings.patience;
        let mut failures = 0;
        while partial.length < announced.bytes {
            let before = partial.length;
            match self.receive(announced, partial, bar) {
                Ok(()) => {}
                Err(error) if error.may_pass() => {
                    failures = if partial.length > before { 1 } else { failures + 1 };
                    if failures >= attempts {
                        return Err(error);
                    }
                    std::thread::sleep(pause * 2_u32.pow(failures - 1));
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// One answer, from the first missing byte on.
    fn receive(
        &self,
        announced: &Announced,
        partial: &mut Partial,
        bar: &ProgressBar,
    ) -> Result<(), HubError> {
        let mut request = self.hub().agent.get(&self.url);
        if partial.length > 0 {
            request = request.header("Range", format!("bytes={}-", partial.length));
        }
        let response = self.hub().call(request, &self.url)?;
        self.hub().check(self.snapshot.name, &self.url, &response)?;
        if response.status() == StatusCode::PARTIAL_CONTENT {
            let expected = format!("bytes {}-", partial.length);
            let range = header(&response, "Content-Range").unwrap_or_default();
            if !range.starts_with(&expected) {
                return Err(
                    self.answer(format!("asked for bytes from {} on, it sends `{range}`", partial.length))
                );
            }
        } else {
            // This server sends whole files only.
            partial.restart()?;
        }
        bar.set_position(partial.length);
        let mut body = response.into_body().into_reader();
        let mut buffer = vec![0; BUFFER_BYTES];
        loop {
            let count = match body.read(&mut buffer) {
                Ok(0) if partial.length < announced.bytes => {
                    return Err(self.broken(announced, partial, "it ended early"));
                }
                Ok(0) => return Ok(()),
                Ok(count) => count,
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(error) => return Err(self.broken(announced, partial, &error.to_string())),
            };
            if partial.length + count as u64 > announced.bytes {
                partial.discard();
                let message = format!("it has more than the {} bytes that were announced", announced.bytes);
                return Err(HubError::Content { file: self.file.to_owned(), message });
            }
            partial.append(&buffer[..count])?;
            bar.set_position(partial.length);
        }
    }

    /// Puts the content into the snapshot under the file's name.
    fn link(&self, blob: &Path) -> io::Result<()> {
        let path = self.snapshot.folder().join(self.file);
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder)?;
        }
        if path.symlink_metadata().is_ok() {
            // A link whose content had been removed.
            fs::remove_file(&path)?;
        }
        // From `snapshots/COMMIT/FILE` to `blobs/HASH`.
        let up = "../".repeat(self.file.split('/').count() + 1);
        let target = Path::new(&up).join("blobs").join(blob.file_name().unwrap_or_default());
        // Not every drive has links; the cache of `huggingface_hub` then holds the content itself in this place.
        link_file(&target, &path).or_else(|_| fs::rename(blob, &path))
    }

    fn answer(&self, message: String) -> HubError {
        HubError::Answer { url: self.url.clone(), message }
    }

    fn broken(&self, announced: &Announced, partial: &Partial, cause: &str) -> HubError {
        HubError::Broken {
            file: self.file.to_owned(),
            received: partial.length,
            bytes: announced.bytes,
            cause: cause.to_owned(),
        }
    }
}

fn hash_of(file: &mut File) -> io::Result<Sha256> {
    let (mut hash, mut buffer) = (Sha256::new(), vec![0; BUFFER_BYTES]);
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(hash),
            count => hash.update(&buffer[..count]),
        }
    }
}

#[cfg(unix)]
fn link_file(target: &Path, path: &Path) -> io::Result<()> {
    std::os::unix::fs::symlink(target, path)
}

#[cfg(not(unix))]
fn link_file(_: &Path, _: &Path) -> io::Result<()> {
    Err(ErrorKind::Unsupported.into())
}

impl Partial {
    /// What an earlier attempt left, or nothing.
    fn open(blob: &Path, announced: &Announced) -> Result<Self, HubError> {
        let path = blob.with_file_name(format!("{}.incomplete", announced.hash));
        let fault = |source: io::Error| HubError::cache(&path, source);
        fs::create_dir_all(blob.parent().unwrap_or(blob)).map_err(fault)?;
        let options = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path);
        let mut file = options.map_err(fault)?;
        let mut length = file.metadata().map_err(fault)?.len();
        if length > announced.bytes {
            file.set_len(0).map_err(fault)?;
            length = 0;
        }
        let is_sha256 = announced.hash.len() == SHA256_DIGITS
            && announced.hash.bytes().all(|byte| byte.is_ascii_hexdigit());
        let hash = is_sha256.then(|| hash_of(&mut file)).transpose().map_err(fault)?;
        file.seek(SeekFrom::Start(length)).map_err(fault)?;
        Ok(Self { path, file, length, hash })
    }

    fn restart(&mut self) -> Result<(), HubError> {
        let empty = self.file.set_len(0).and_then(|()| self.file.seek(SeekFrom::Start(0)));
        empty.map_err(|source| HubError::cache(&self.path, source))?;
        self.length = 0;
        self.hash = self.hash.as_ref().map(|_| Sha256::new());
        Ok(())
    }

    fn append(&mut self, bytes: &[u8]) -> Result<(), HubError> {
        self.file.write_all(bytes).map_err(|source| HubError::cache(&self.path, source))?;
        self.length += bytes.len() as u64;
        if let Some(hash) = &mut self.hash {
            hash.update(bytes);
        }
        Ok(())
    }

    /// Gives the content its final name, once it is on the disk.
    fn finish(self, blob: &Path, announced: &Announced, file: &str) -> Result<(), HubError> {
        let found = self
            .hash
            .as_ref()
            .map(|hash| hash.clone().finalize().iter().map(|byte| format!("{byte:02x}")).collect::<String>());
        if let Some(found) = found.filter(|found| !announced.hash.eq_ignore_ascii_case(found)) {
            self.discard();
            let message = format!("its SHA-256 is {found}, announced was {}", announced.hash);
            return Err(HubError::Content { file: file.to_owned(), message });
        }
        let placed = self.file.sync_all().and_then(|()| fs::rename(&self.path, blob));
        placed.map_err(|source| HubError::cache(blob, source))
    }

    /// Throws away what came. That it stays if this fails only means that it is found wrong again.
    fn discard(&self) {
        let _ = fs::remove_file(&self.path);
    }
}
