//! The stacks that the suite is run on.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;

use polytropo_libservices::dir::Dir;
use polytropo_libservices::stack::{DirCoherence, DirLayer, Ownership};

use crate::suite::Stack;

/// A `dir` layer over `path`.
pub fn layer(path: &Path, coherence: DirCoherence, ownership: Ownership) -> Dir {
    let root = OwnedFd::from(std::fs::File::open(path).unwrap());
    let config = DirLayer { path: path.to_owned(), read_only: false, coherence, ownership };
    Dir::new(root, &config).unwrap()
}

pub fn directory(coherence: DirCoherence, ownership: Ownership) -> Stack {
    let temp = tempfile::tempdir().unwrap();
    let service = Arc::new(layer(temp.path(), coherence, ownership));
    Stack::new(service, temp.path().to_owned(), temp)
}
