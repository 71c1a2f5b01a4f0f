//! The stack document: libservices composed, as data.
//!
//! Python writes it, the service checks it whole before it starts. A wrong one is refused with one
//! sentence that names the place: `root.lowers[1].path: ...`.

use std::fmt::Write;
use std::path::{Path, PathBuf};

use crate::fault;
use serde::{Deserialize, Serialize};

/// The version that this program reads and writes.
pub const VERSION: u32 = 1;

/// Bound on nesting, so that a hostile document cannot exhaust the stack.
pub const DEPTH_MAX: usize = 16;
/// Bound on the layers of one union (Docker stops at 127).
pub const LOWERS_MAX: usize = 500;

/// A whole stack document.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StackDocument {
    pub version: u32,
    pub root: Layer,
    /// Whether the kernel reads files of immutable layers itself, where it can; it then asks for every open and writes
    /// through. By default it does not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub passthrough: Option<bool>,
    /// Smaller files are left to the mount's own cache.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub passthrough_min_bytes: Option<u64>,
    /// Whether the kernel holds back what programs write where only this service writes: by default in directories, and
    /// not in unions, whose files are opened, told of and read much more often than written in small pieces.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub write_back: Option<bool>,
    /// Whether programs at channels may write where only this service writes. The kernel then holds back no writes and asks for every
    /// open. It says how the stack is served, not what it is: stacks that differ in it alone are served together, as the first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub channel_writes: Option<bool>,
}

/// One libservice and what it stands on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub enum Layer {
    Dir(DirLayer),
    Union(UnionLayer),
    Fault(FaultLayer),
}

/// A directory of the host.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DirLayer {
    /// Absolute path on the host.
    pub path: PathBuf,
    #[serde(default)]
    pub read_only: bool,
    #[serde(default)]
    pub coherence: DirCoherence,
    #[serde(default)]
    pub ownership: Ownership,
}

/// Who else changes the directory; see [`crate::Coherence`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DirCoherence {
    Immutable,
    Exclusive,
    #[default]
    Shared,
}

/// Where owner, mode and device numbers are kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Ownership {
    /// In the host's inodes.
    #[default]
    Native,
    /// In the extended attribute `user.polytropo.stat`, for services that may not chown.
    Xattr,
}

/// Read-only lowers, the topmost first, under an optional writable upper.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct UnionLayer {
    pub lowers: Vec<Layer>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub upper: Option<Box<Layer>>,
}

/// Errors, delays and short results on demand.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FaultLayer {
    pub below: Box<Layer>,
    pub rules: Vec<FaultRule>,
    /// Seed of the dice for `probability`.
    #[serde(default)]
    pub seed: u64,
}

/// One rule of a `fault` layer: when it applies and what it does.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FaultRule {
    /// An operation by its name in the trait (`read`, `create`), or `*`.
    pub operation: String,
    /// Calls let through first.
    #[serde(default)]
    pub after: u64,
    /// How many calls are hit; 0 means all.
    #[serde(default)]
    pub times: u64,
    /// Chance that a call is hit, 0 to 1.
    #[serde(default = "certain")]
    pub probability: f64,
    /// Answer with this error (`EIO`, `ENOSPC`, ...).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub errno: Option<String>,
    /// Wait first.
    #[serde(default)]
    pub delay_ms: u64,
    /// End the service's worker, as a fault of its own would.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub kill: bool,
    /// Let a read or write do at most this much.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub short_bytes: Option<u64>,
}

fn certain() -> f64 {
    1.0
}

/// Why a document was refused: the place in it and one sentence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StackError {
    pub place: String,
    pub problem: String,
}

impl std::fmt::Display for StackError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Field names come from the document; a terminal must not obey them.
        let sentence = format!("stack document: {}: {}", self.place, self.problem);
        sentence.chars().try_for_each(|c| match c.is_control() {
            true => write!(f, "{}", c.escape_default()),
            false => f.write_char(c),
        })
    }
}

impl std::error::Error for StackError {}

fn refuse<T>(place: &str, problem: impl Into<String>) -> Result<T, StackError> {
    Err(StackError { place: place.to_owned(), problem: problem.into() })
}

impl StackDocument {
    /// Whether the kernel may hold back writes, where it can.
    pub fn writes_back(&self) -> bool {
        self.write_back.unwrap_or(!matches!(self.root, Layer::Union(_)))
    }

    /// Reads and checks a document whole.
    pub fn parse(json: &str) -> Result<Self, StackError> {
        let value: serde_json::Value = serde_json::from_str(json)
            .map_err(|e| StackError { place: "document".into(), problem: e.to_string() })?;
        check_version(&value)?;
        check_words(&value, "root")?;
        let mut reader = serde_json::Deserializer::from_str(json);
        let document: StackDocument = serde_path_to_error::deserialize(&mut reader).map_err(|e| {
            let place = e.path().to_string();
            StackError { place, problem: e.inner().to_string() }
        })?;
        reader.end().map_err(|e| StackError { place: "end".into(), problem: e.to_string() })?;
        document.check()?;
        Ok(document)
    }

    /// What the types cannot say.
    pub fn check(&self) -> Result<(), StackError> {
        if self.version != VERSION {
            return refuse("version", version_problem(self.version.into()));
        }
        self.root.check("root", 0)
    }

    pub fn to_json(&self) -> String {
        serde_json::to_string(self).expect("a stack document has only string keys")
    }

    /// The `dir` layers in document order (uppers before lowers): the order in which their roots are handed over.
    pub fn dirs(&self) -> Vec<&DirLayer> {
        let mut found = Vec::new();
        self.root.collect_dirs(&mut found);
        found
    }
}

// The version is looked at before anything else, so that a newer document is called newer and not malformed.
fn check_version(value: &serde_json::Value) -> Result<(), StackError> {
    match value.get("version").map(serde_json::Value::as_u64) {
        None => refuse("version", "is missing; write \"version\": 1"),
        Some(Some(n)) if n == u64::from(VERSION) => Ok(()),
        Some(Some(n)) => refuse("version", version_problem(n)),
        Some(None) => refuse("version", "is not a whole number"),
    }
}

// serde also takes a number or an object for a word that stands for a choice; a document may only name it.
// The depth of `value` is bounded by serde_json.
fn check_words(value: &serde_json::Value, within: &str) -> Result<(), StackError> {
    match value {
        serde_json::Value::Object(fields) => fields.iter().try_for_each(|(name, field)| {
            if matches!(name.as_str(), "kind" | "coherence" | "ownership") && !field.is_string() {
                return refuse(within, format!("the value of `{name}` is not a word"));
            }
            check_words(field, name)
        }),
        serde_json::Value::Array(items) => items.iter().try_for_each(|item| check_words(item, within)),
        _ => Ok(()),
    }
}

fn version_problem(version: u64) -> String {
    if version > VERSION.into() {
        format!("is {version}, but this program reads version {VERSION}; use a newer polytropo")
    } else {
        format!("is {version}, but this program reads version {VERSION}")
    }
}

impl Layer {
    fn check(&self, place: &str, depth: usize) -> Result<(), StackError> {
        if depth >= DEPTH_MAX {
            return refuse(place, format!("is nested deeper than {DEPTH_MAX} layers"));
        }
        match self {
            Layer::Dir(dir) => check_host_path(&dir.path, place),
            Layer::Union(union) => union.check(place, depth),
            Layer::Fault(fault) => fault.check(place, depth),
        }
    }

    fn collect_dirs<'a>(&'a self, found: &mut Vec<&'a DirLayer>) {
        match self {
            Layer::Dir(dir) => found.push(dir),
            Layer::Union(union) => {
                for layer in union.upper.as_deref().into_iter().chain(&union.lowers) {
                    layer.collect_dirs(found);
                }
            }
            Layer::Fault(fault) => fault.below.collect_dirs(found),
        }
    }
}

fn check_host_path(path: &Path, place: &str) -> Result<(), StackError> {
    if !path.is_absolute() {
        return refuse(
            &format!("{place}.path"),
            format!("\"{}\" is not absolute; begin it with a slash", path.display()),
        );
    }
    Ok(())
}

impl UnionLayer {
    fn check(&self, place: &str, depth: usize) -> Result<(), StackError> {
        if self.lowers.is_empty() {
            return refuse(&format!("{place}.lowers"), "is empty; a union needs at least one lower layer");
        }
        if self.lowers.len() > LOWERS_MAX {
            return refuse(
                &format!("{place}.lowers"),
                format!("has {} layers; at most {LOWERS_MAX} work", self.lowers.len()),
            );
        }
        for (i, lower) in self.lowers.iter().enumerate() {
            lower.check(&format!("{place}.lowers[{i}]"), depth + 1)?;
        }
        match &self.upper {
            Some(upper) => upper.check(&format!("{place}.upper"), depth + 1),
            None => Ok(()),
        }
    }
}

impl FaultLayer {
    fn check(&self, place: &str, depth: usize) -> Result<(), StackError> {
        for (i, rule) in self.rules.iter().enumerate() {
            let place = format!("{place}.rules[{i}]");
            if !(0.0..=1.0).contains(&rule.probability) {
                return refuse(
                    &format!("{place}.probability"),
                    format!("is {}; it lies between 0 and 1", rule.probability),
                );
            }
            if rule.errno.is_none() && rule.delay_ms == 0 && rule.short_bytes.is_none() && !rule.kill {
                return refuse(&place, "does nothing; give errno, delay_ms, short_bytes or kill");
            }
            if rule.short_bytes == Some(0) {
                return refuse(&format!("{place}.short_bytes"), "is 0; at least 1 byte must pass");
            }
            rule.check_names(&place)?;
        }
        self.below.check(&format!("{place}.below"), depth + 1)
    }
}

impl FaultRule {
    fn check_names(&self, place: &str) -> Result<(), StackError> {
        if self.operation != fault::ANY && !fault::OPERATIONS.contains(&self.operation.as_str()) {
            let problem = format!(
                "{:?} is no operation; write \"*\" or one of {}",
                self.operation,
                fault::OPERATIONS.join(", ")
            );
            return refuse(&format!("{place}.operation"), problem);
        }
        match &self.errno {
            Some(name) if fault::errno_by_name(name).is_none() => refuse(
                &format!("{place}.errno"),
                format!("{name:?} is no error that a filesystem answers with; \"EIO\" is one"),
            ),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(json: &str) -> String {
        StackDocument::parse(json).unwrap_err().to_string()
    }

    #[test]
    fn reads_what_it_writes() {
        let json = r#"{"version":1,"root":{"kind":"union","lowers":[{"kind":"dir","path":"/l","read_only":true}],
            "upper":{"kind":"fault","below":{"kind":"dir","path":"/u"},"rules":[{"operation":"read","errno":"EIO"}]}}}"#;
        let document = StackDocument::parse(json).unwrap();
        assert_eq!(StackDocument::parse(&document.to_json()).unwrap(), document);
        let paths: Vec<_> = document.dirs().iter().map(|d| d.path.clone()).collect();
        assert_eq!(paths, [PathBuf::from("/u"), PathBuf::from("/l")]);
    }

    #[test]
    fn names_the_place_of_what_is_wrong() {
        assert_eq!(
            refused(r#"{"version":2,"root":{"kind":"new"}}"#),
            "stack document: version: is 2, but this program reads version 1; use a newer polytropo"
        );
        let relative = refused(
            r#"{"version":1,"root":{"kind":"union","lowers":[{"kind":"dir","path":"/a"},{"kind":"dir","path":"b"}]}}"#,
        );
        assert!(relative.contains("root.lowers[1].path: \"b\" is not absolute"), "{relative}");
        let unknown = refused(r#"{"version":1,"root":{"kind":"dir","path":"/a","colour":1}}"#);
        assert!(unknown.contains("root") && unknown.contains("colour"), "{unknown}");
        assert!(refused(r#"{"root":{}}"#).contains("version: is missing"));
        assert!(refused(r#"{"version":1,"root":{"kind":0,"path":"/a"}}"#).contains("`kind` is not a word"));
        assert!(refused("{").contains("document"));
        let bell = refused(r#"{"version":1,"root":{"kind":"dir","path":"/a","\u0007\n":1}}"#);
        assert!(bell.contains("`\\u{7}\\n`"), "{bell}");
        assert!(
            refused(r#"{"version":1,"root":{"kind":"union","lowers":[]}}"#).contains("root.lowers: is empty")
        );
    }

    #[test]
    fn bounds_nesting() {
        let mut layer = r#"{"kind":"dir","path":"/a"}"#.to_owned();
        for _ in 0..DEPTH_MAX {
            layer = format!(r#"{{"kind":"union","lowers":[{layer}]}}"#);
        }
        assert!(refused(&format!(r#"{{"version":1,"root":{layer}}}"#)).contains("nested deeper than"));
    }
}
