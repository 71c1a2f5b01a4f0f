//! Operations that fail half way, or never end because the service is killed: afterwards everything is as before or
//! as if they had succeeded.

use std::collections::BTreeMap;
use std::sync::Arc;

use polytropo_libservices::fault::Fault;
use polytropo_libservices::owners::Owners;
use polytropo_libservices::stack::{DirCoherence, DirLayer, FaultLayer, FaultRule, Layer, Ownership};
use polytropo_libservices::union::Union;
use polytropo_libservices::*;
use proptest::prelude::*;

use crate::model::{self, Ino, Kind, Model};
use crate::operations::{Answer, Operation, Shown, beginnings, unopened};
use crate::subject::{Subject, read, shown};
use crate::{Place, dir, run_cases, skipped};

/// What is found at each path: attributes, bytes or target, extended attributes, and the first path of the same inode.
type Tree = BTreeMap<String, (Shown, Vec<u8>, BTreeMap<String, Vec<u8>>, String)>;

fn tree_of_model(model: &Model, ino: Ino, path: &str, first: &mut BTreeMap<Ino, String>, tree: &mut Tree) {
    for (name, &child) in model.entries(ino).unwrap() {
        let path = format!("{path}/{name}");
        let inode = &model.inodes[child];
        let same = first.entry(child).or_insert_with(|| path.clone()).clone();
        let bytes = match &inode.kind {
            Kind::File(bytes) => bytes.clone(),
            Kind::Link(target) => target.clone().into_bytes(),
            Kind::Dir(_) | Kind::Fifo => Vec::new(),
        };
        tree.insert(path.clone(), (inode.shown(), bytes, inode.xattrs.clone(), same));
        if inode.shown().mode & libc::S_IFMT == libc::S_IFDIR {
            tree_of_model(model, child, &path, first, tree);
        }
    }
}

fn tree_of_stack(
    s: &dyn Libservice,
    node: NodeId,
    path: &str,
    first: &mut BTreeMap<u64, String>,
    tree: &mut Tree,
) -> Result<()> {
    let c = Caller::service();
    let handle = s.opendir(&c, node)?;
    let mut names = Vec::new();
    s.readdir(&c, node, handle, 0, &mut |entry| {
        names.push(entry.name.to_boxed());
        true
    })?;
    s.releasedir(node, handle);
    names.sort();
    for name in names {
        let path = format!("{path}/{}", String::from_utf8_lossy(name.as_bytes()));
        let entry = s.lookup(&c, node, &name)?;
        let same = first.entry(entry.attr.ino).or_insert_with(|| path.clone()).clone();
        let bytes = match entry.attr.file_type() {
            libc::S_IFREG => {
                let handle = s.open(&c, entry.node, OpenFlags::READ)?.handle;
                let answer = read(s, entry.node, handle, 0, entry.attr.size_bytes as usize + 10)?;
                s.release(entry.node, handle);
                let Answer::Bytes(bytes) = answer else { unreachable!() };
                bytes
            }
            libc::S_IFLNK => s.readlink(&c, entry.node)?,
            _ => Vec::new(),
        };
        let list = s.listxattr(&c, entry.node)?;
        let mut xattrs = BTreeMap::new();
        for key in list.split(|&b| b == 0).filter(|key| key.starts_with(b"user.")) {
            xattrs.insert(String::from_utf8_lossy(key).into_owned(), s.getxattr(&c, entry.node, key)?);
        }
        tree.insert(path.clone(), (shown(&entry.attr), bytes, xattrs, same));
        if entry.attr.is_dir() {
            tree_of_stack(s, entry.node, &path, first, tree)?;
        }
        s.forget(entry.node, 1);
    }
    Ok(())
}

fn expected(model: &Model) -> Tree {
    let mut tree = Tree::new();
    tree_of_model(model, model::ROOT, "", &mut BTreeMap::new(), &mut tree);
    tree
}

fn found(stack: &dyn Libservice) -> Tree {
    let mut tree = Tree::new();
    tree_of_stack(stack, NodeId::ROOT, "", &mut BTreeMap::new(), &mut tree).unwrap();
    tree
}

/// When the layer that takes the changes stops to obey.
#[derive(Clone, Copy, Debug)]
struct Break {
    after: u64,
    /// All calls from then on fail, as if the service were killed; or only one.
    for_good: bool,
}

fn breaks() -> impl Strategy<Value = Break> {
    (0..25u64, any::<bool>()).prop_map(|(after, for_good)| Break { after, for_good })
}

type Build = dyn Fn(&Place, Option<Break>) -> Result<Arc<dyn Libservice>>;

fn breaking(below: Arc<dyn Libservice>, broken: Option<Break>) -> Result<Arc<dyn Libservice>> {
    let Some(broken) = broken else { return Ok(below) };
    let rule = FaultRule {
        operation: "*".into(),
        after: broken.after,
        times: u64::from(!broken.for_good),
        probability: 1.0,
        errno: Some("EIO".into()),
        delay_ms: 0,
        kill: false,
        short_bytes: None,
    };
    let unused = Box::new(Layer::Dir(DirLayer {
        path: "/".into(),
        read_only: false,
        coherence: DirCoherence::Exclusive,
        ownership: Ownership::Native,
    }));
    Ok(Arc::new(Fault::new(below, &FaultLayer { below: unused, rules: vec![rule], seed: 0 })?))
}

/// The upper breaks.
fn union(place: &Place, broken: Option<Break>) -> Result<Arc<dyn Libservice>> {
    let lower = dir(&place.seed, DirCoherence::Immutable, Ownership::Native, true);
    let upper = dir(&place.upper, DirCoherence::Exclusive, Ownership::Native, false);
    Ok(Arc::new(Union::new(vec![lower], Some(breaking(upper, broken)?))?))
}

/// The directory under the records of owners breaks, but the service lives: killed while it makes a file, it may leave
/// one without a record.
fn owners(place: &Place, broken: Option<Break>) -> Result<Arc<dyn Libservice>> {
    let below = dir(&place.seed, DirCoherence::Exclusive, Ownership::Native, false);
    let broken = broken.map(|broken| Break { after: broken.after / 3, for_good: false });
    Ok(Arc::new(Owners::new(breaking(below, broken)?)))
}

fn one_case(ownership: Ownership, build: &Build, beginning: &[Operation], operations: &[(Operation, Break)]) {
    let place = Place::new();
    let mut model = Model::new();
    let mut plain = Subject::new(dir(&place.seed, DirCoherence::Exclusive, ownership, false));
    for operation in beginning {
        if !model.has_no_sense(operation) {
            assert_eq!(plain.run(operation), model.run(operation), "{operation:?}");
        }
    }
    drop(plain);
    for (operation, broken) in operations {
        if model.has_no_sense(operation) {
            continue;
        }
        let before = expected(&model);
        let right = model.run(operation);
        let after = expected(&model);
        // A stack that cannot even begin has changed nothing.
        let outcome = match build(&place, Some(*broken)) {
            Ok(service) => Subject::new(service).run(operation),
            Err(e) => Err(e.errno()),
        };
        let found = found(&*build(&place, None).unwrap());
        if outcome == right {
            assert!(found == after, "{operation:?} with {broken:?}: {outcome:?}, but found {found:#?}");
            continue;
        }
        assert_eq!(outcome, Err(Errno::IO), "{operation:?} with {broken:?}");
        assert!(
            found == before || found == after,
            "{operation:?} with {broken:?} left neither the old state nor the new one: {found:#?}"
        );
        if found == before && found != after {
            // Again without faults, so that the cases get somewhere.
            let mut whole = Subject::new(build(&place, None).unwrap());
            assert_eq!(whole.run(operation), right, "{operation:?} after it broke");
        }
    }
    let found = found(&*build(&place, None).unwrap());
    assert!(found == expected(&model), "found {found:#?}");
}

fn hold(ownership: Ownership, build: &Build) {
    if skipped(ownership) {
        return;
    }
    let operations = proptest::collection::vec((unopened(), breaks()), 1..12);
    run_cases(&(beginnings(), operations), |(beginning, operations)| {
        one_case(ownership, build, &beginning, &operations);
    });
}

#[test]
fn unions_are_never_left_half_changed() {
    hold(Ownership::Native, &union);
}

#[test]
fn records_of_owners_are_never_left_half_made() {
    hold(Ownership::Xattr, &owners);
}
