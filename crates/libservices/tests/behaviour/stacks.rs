//! The stacks that the suite is run on.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;

use polytropo_libservices::dir::Dir;
use polytropo_libservices::fault::Fault;
use polytropo_libservices::owners::Owners;
use polytropo_libservices::stack::{DirCoherence, DirLayer, FaultLayer, Layer, Ownership, StackDocument};
use polytropo_libservices::union::{BlockSizes, Union};
use polytropo_libservices::{Capabilities, Libservice, build};

use crate::suite::Stack;

/// A `dir` layer over `path`.
pub fn layer(path: &Path, coherence: DirCoherence, ownership: Ownership) -> Dir {
    let root = OwnedFd::from(std::fs::File::open(path).unwrap());
    let config = DirLayer { path: path.to_owned(), read_only: false, coherence, ownership };
    Dir::new(root, &config).unwrap()
}

/// Whether this process can make inodes of other owners than itself.
pub fn may_chown() -> bool {
    let temp = tempfile::tempdir().unwrap();
    let dir = layer(temp.path(), DirCoherence::Exclusive, Ownership::Native);
    dir.capabilities().contains(Capabilities::OWNERS)
}

pub fn directory(coherence: DirCoherence, ownership: Ownership) -> Stack {
    let temp = tempfile::tempdir().unwrap();
    let dir = Arc::new(layer(temp.path(), coherence, ownership));
    let service: Arc<dyn Libservice> = match ownership {
        Ownership::Native => dir,
        Ownership::Xattr => Arc::new(Owners::new(dir)),
    };
    Stack::new(service, temp.path().to_owned(), temp)
}

/// As services build it from a document.
pub fn built() -> Stack {
    let temp = tempfile::tempdir().unwrap();
    let json = r#"{"version":1,"root":{"kind":"dir","path":"/a","coherence":"exclusive"}}"#;
    let root = OwnedFd::from(std::fs::File::open(temp.path()).unwrap());
    let service = build(&StackDocument::parse(json).unwrap(), vec![root]).unwrap();
    Stack::new(service, temp.path().to_owned(), temp)
}

/// A layer of faults that never strike.
pub fn faultless() -> Stack {
    let temp = tempfile::tempdir().unwrap();
    let dir = Arc::new(layer(temp.path(), DirCoherence::Exclusive, Ownership::Native));
    let below = Box::new(Layer::Dir(DirLayer {
        path: temp.path().to_owned(),
        read_only: false,
        coherence: DirCoherence::Exclusive,
        ownership: Ownership::Native,
    }));
    let config = FaultLayer { below, rules: Vec::new(), seed: 0 };
    Stack::new(Arc::new(Fault::new(dir, &config).unwrap()), temp.path().to_owned(), temp)
}

/// A union of two lowers and an upper; seeds go to the lowest.
pub fn union(coherence: DirCoherence, ownership: Ownership) -> Stack {
    union_by(coherence, ownership, BlockSizes::default())
}

pub fn union_by(coherence: DirCoherence, ownership: Ownership, sizes: BlockSizes) -> Stack {
    let temp = tempfile::tempdir().unwrap();
    let layer = |name: &str, coherence| -> Arc<dyn Libservice> {
        let path = temp.path().join(name);
        std::fs::create_dir(&path).unwrap();
        let dir = Arc::new(layer(&path, coherence, ownership));
        match ownership {
            Ownership::Native => dir,
            Ownership::Xattr => Arc::new(Owners::new(dir)),
        }
    };
    let lowers = vec![layer("top", coherence), layer("bottom", coherence)];
    let upper =
        layer("upper", if coherence == DirCoherence::Shared { coherence } else { DirCoherence::Exclusive });
    let seed = temp.path().join("bottom");
    Stack::new(Arc::new(Union::with_sizes(lowers, Some(upper), sizes).unwrap()), seed, temp)
}
