//! Folders that do not serve, disks that are full, files that lose their end, kernels that refuse.

use std::{
    io::{BufRead, BufReader},
    path::Path,
    process::{Command, Stdio},
};

use deepspeed_core::{DType, Span, SpanMut};
use deepspeed_offload::{
    Access, Depth, EngineChoice, EngineKind, Item, Lane, OffloadError, Options, Region, Store, Stream,
};
use fs_err as fs;
use rustix::process::{Resource, Rlimit, setrlimit};

use crate::support::{
    OWN_MOUNTS, ROOT_MOUNTS, assert_passed, folder_from_parent, folders, in_child, nameless_files, numbers,
    store, ways,
};

fn refusal(folder: &Path, bytes: u64) -> OffloadError {
    Store::create(folder, bytes, &Options::default()).unwrap_err()
}

#[test]
fn a_missing_folder_is_named() {
    let error = refusal(Path::new("/nowhere/nvme"), 4096);
    assert_eq!(
        error.to_string(),
        "cannot make a file for offloaded state in /nowhere/nvme (nvme_path): No such file or directory (os error 2); \
         make the folder, or correct nvme_path"
    );
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("file");
    fs::write(&file, "").unwrap();
    assert!(refusal(&file, 4096).to_string().ends_with("nvme_path must be a folder"));
}

#[test]
fn more_than_is_free_is_refused_before_it_fills_the_disk() {
    for folder in folders() {
        let error = refusal(folder.path(), 1 << 55);
        let OffloadError::NoSpace { asked, free, .. } = error else { panic!("{error}") };
        assert!(asked == 1 << 55 && free < asked);
        let message = error.to_string();
        assert!(message.starts_with("36.0 PB of offloaded state do not fit in /"), "{message}");
        assert!(message.contains(folder.path().to_str().unwrap()), "{message}");
        assert!(
            message.ends_with("free space there, choose another nvme_path, or train on more ranks"),
            "{message}"
        );
    }
}

#[test]
fn nothing_is_ever_seen_in_the_folder() {
    for folder in folders() {
        for options in ways() {
            let Some(store) = store(folder.path(), 1 << 20, &options) else { continue };
            assert_eq!(nameless_files(folder.path()).len(), 1);
            assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
            drop(store);
            assert_eq!(nameless_files(folder.path()).len(), 0);
        }
    }
}

/// The process that the next test kills.
#[test]
#[ignore = "run by a_killed_process_leaves_nothing"]
fn holds_a_store() {
    let Some(folder) = folder_from_parent() else { return };
    let store = Store::create(&folder, 1 << 20, &Options::default()).unwrap();
    println!("ready {}", store.describe());
    std::thread::sleep(std::time::Duration::from_secs(60));
}

#[test]
fn a_killed_process_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "faults::holds_a_store", "--ignored", "--nocapture"])
        .env("OFFLOAD_TEST_FOLDER", folder.path())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    assert!(lines.any(|line| line.unwrap().contains("ready ")));
    child.kill().unwrap();
    child.wait().unwrap();
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
}

#[test]
#[ignore = "run by a_full_disk_is_told_before_training"]
fn on_a_small_disk() {
    let Some(folder) = folder_from_parent() else { return };
    let message = refusal(&folder, 2 << 20).to_string();
    assert!(message.starts_with("2.1 MB of offloaded state do not fit in "), "{message}");
    assert!(message.contains(": 1.0 MB are free; "), "{message}");
    // What fits is had, and what it takes is not free any more.
    let _store = Store::create(&folder, 600 << 10, &Options::default()).unwrap();
    assert!(matches!(refusal(&folder, 600 << 10), OffloadError::NoSpace { free: 434_176, .. }));
}

#[test]
fn a_full_disk_is_told_before_training() {
    assert_passed(in_child(
        "faults::on_a_small_disk",
        "mount -t tmpfs -o size=1m none \"$FOLDER\"",
        OWN_MOUNTS,
    ));
}

#[test]
#[ignore = "run by a_read_only_folder_is_told"]
fn on_a_read_only_disk() {
    let Some(folder) = folder_from_parent() else { return };
    let message = refusal(&folder, 4096).to_string();
    assert!(message.ends_with("choose a folder on a disk that is mounted writable"), "{message}");
}

#[test]
fn a_read_only_folder_is_told() {
    assert_passed(in_child(
        "faults::on_a_read_only_disk",
        "mount -t tmpfs -o ro none \"$FOLDER\"",
        OWN_MOUNTS,
    ));
}

#[test]
#[ignore = "run by a_file_size_limit_is_told"]
fn under_a_file_size_limit() {
    let Some(folder) = folder_from_parent() else { return };
    let message = refusal(&folder, 1 << 20).to_string();
    assert!(message.starts_with("cannot reserve 1.0 MB of offloaded state in "), "{message}");
    assert!(message.contains("File too large") && message.contains("ulimit -f"), "{message}");
}

#[test]
fn a_file_size_limit_is_told() {
    assert_passed(in_child("faults::under_a_file_size_limit", "trap '' XFSZ && ulimit -f 100", &[]));
}

#[test]
#[ignore = "run by a_refused_write_is_told_and_kept"]
fn writes_are_refused() {
    let Some(folder) = folder_from_parent() else { return };
    for options in ways() {
        let limit = |bytes| setrlimit(Resource::Fsize, Rlimit { current: bytes, maximum: None }).unwrap();
        limit(None);
        let Some(store) = store(&folder, 1 << 20, &options) else { continue };
        let regions: Vec<Region> = (0..4).map(|_| store.allocate(50_000, DType::F32).unwrap()).collect();
        let items: Vec<Item> = regions.iter().map(|region| Item::whole(0, &[*region])).collect();
        let mut stream = Stream::new(&store, &[Lane::f32(50_000)], Depth { read_ahead: 1, write_behind: 3 });
        limit(Some(8192));

        let mut pass = stream.pass(&items, &[Access::Update]).unwrap();
        let mut run = || {
            while let Some(loaded) = pass.load_next()? {
                loaded.write_back()?;
            }
            Ok(())
        };
        let first: Result<(), OffloadError> = run();
        let error = first.and(pass.finish().map(drop)).unwrap_err();
        let OffloadError::Io { offset, .. } = error else { panic!("{error}") };
        assert!(offset >= 8192, "{error}");
        assert!(error.to_string().contains("File too large"), "{error}");
        assert_eq!(stream.pass(&items, &[Access::Read]).unwrap_err().to_string(), error.to_string());
    }
}

#[test]
fn a_refused_write_is_told_and_kept() {
    assert_passed(in_child("faults::writes_are_refused", "trap '' XFSZ", &[]));
}

#[test]
fn a_file_that_lost_its_end_is_told() {
    for folder in folders() {
        for options in ways() {
            let bytes = Store::bytes_of(50_000, DType::F32);
            let Some(store) = store(folder.path(), bytes, &options) else { continue };
            let region = store.allocate(50_000, DType::F32).unwrap();
            store.write(&region, Span::from(&numbers(50_000, 1)[..])).unwrap();
            let [file] = &nameless_files(folder.path())[..] else { panic!("one store, one file") };
            fs::OpenOptions::new().write(true).open(file).unwrap().set_len(100_000).unwrap();

            let mut read = vec![0f32; 50_000];
            let error = store.read(&region, SpanMut::from(&mut read[..])).unwrap_err();
            let OffloadError::Short { offset, bytes, moved, .. } = error else { panic!("{error}") };
            assert!(moved < bytes && offset + bytes as u64 > 100_000, "{error}");
            assert!(error.to_string().contains(&format!("moved {moved} and no more")), "{error}");
        }
    }
}

#[test]
#[ignore = "run by a_kernel_without_io_uring_gets_threads"]
fn without_room_for_a_ring() {
    let Some(folder) = folder_from_parent() else { return };
    // Room for one more file: the store's own.
    let next = std::os::fd::AsRawFd::as_raw_fd(&fs::File::open("/dev/null").unwrap());
    let limit = u64::try_from(next).unwrap() + 1;
    setrlimit(Resource::Nofile, Rlimit { current: Some(limit), maximum: Some(limit) }).unwrap();

    let store = Store::create(&folder, 4096, &Options::default()).unwrap();
    assert_eq!(store.describe().engine, EngineKind::Threads);
    let words = store.describe().to_string();
    assert!(
        words.contains("thread pool (16 threads, blocks of 1024 kB; io_uring cannot be used: "),
        "{words}"
    );
    let region = store.allocate(1000, DType::F32).unwrap();
    store.write(&region, Span::from(&numbers(1000, 1)[..])).unwrap();
    drop(store);

    let options = Options { engine: EngineChoice::IoUring, ..Options::default() };
    let error = Store::create(&folder, 4096, &options).unwrap_err();
    assert!(error.to_string().starts_with("cannot use io_uring for offloaded state: "), "{error}");
}

#[test]
fn a_kernel_without_io_uring_gets_threads() {
    assert_passed(in_child("faults::without_room_for_a_ring", "true", &[]));
}

#[test]
#[ignore = "run by the_environment_chooses_the_engine"]
fn with_the_variable_set() {
    let Some(folder) = folder_from_parent() else { return };
    let store = Store::create(&folder, 4096, &Options::default()).unwrap();
    assert_eq!(store.describe().engine, EngineKind::Threads);
    assert!(store.describe().to_string().ends_with("; as asked for)"));
}

#[test]
fn the_environment_chooses_the_engine() {
    assert_passed(in_child("faults::with_the_variable_set", "export DEEPSPEED_OFFLOAD_IO=threads", &[]));
}

#[test]
#[ignore = "run by a_filesystem_that_can_do_little_is_described"]
fn on_a_filesystem_that_can_do_little() {
    let Some(folder) = folder_from_parent() else { return };
    for options in ways() {
        let Some(store) = store(&folder, Store::bytes_of(5000, DType::F32), &options) else { continue };
        let description = store.describe();
        assert!(!description.reserved && description.buffered.is_some(), "{description}");
        let words = description.to_string();
        assert!(
            words.contains("through the page cache (") && words.contains("space not reserved"),
            "{words}"
        );
        let region = store.allocate(5000, DType::F32).unwrap();
        store.write(&region, Span::from(&numbers(5000, 1)[..])).unwrap();
        let mut read = vec![0f32; 5000];
        store.read(&region, SpanMut::from(&mut read[..])).unwrap();
        assert_eq!(read, numbers(5000, 1));
    }
}

#[test]
fn a_filesystem_that_can_do_little_is_described() {
    // A ramfs has no direct I/O, cannot reserve space, and does not say how much is free.
    let setup = "mount -t ramfs none \"$FOLDER\"";
    assert_passed(in_child("faults::on_a_filesystem_that_can_do_little", setup, ROOT_MOUNTS));
}
