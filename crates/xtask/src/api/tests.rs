use super::*;

/// Returns the lines for a crate `demo` of these files.
fn lines(files: &[(&str, &str)]) -> Vec<String> {
    let folder = tempfile::tempdir().unwrap();
    for (name, source) in files {
        let file = folder.path().join(name);
        fs::create_dir_all(file.parent().unwrap()).unwrap();
        fs::write(file, source).unwrap();
    }
    let listing = listing("demo", &folder.path().join("lib.rs")).unwrap();
    let mut lines = listing.lines().map(str::to_owned);
    assert!(lines.next().unwrap().starts_with("# The public interface"));
    lines.collect()
}

/// Checks what is listed of a crate with one file, after the line of its root.
#[track_caller]
fn lists(source: &str, expected: &[&str]) {
    let lines = lines(&[("lib.rs", source)]);
    assert_eq!(lines[0], "pub mod demo");
    assert_eq!(lines[1..], *expected);
}

#[test]
fn every_kind_of_item_is_listed_with_its_signature() {
    lists(
        r#"
        pub const LIMIT: usize = 4;
        pub static NAME: &str = "x";
        pub type Pair<T> = (T, [u8; LIMIT]);
        pub unsafe fn f<'a, T: Clone>(mut x: &'a [T], (a, b): (u8, u8)) -> Option<T>
        where
            T: 'a,
        { None }
        pub union Bits { pub whole: u64, halves: [u32; 2] }
        #[macro_export]
        macro_rules! twice { ($x:expr) => { $x + $x }; }
        fn private() {}
        pub(crate) fn inner() {}
        "#,
        &[
            "pub union demo::Bits",
            "pub demo::Bits::whole: u64",
            "pub const demo::LIMIT: usize",
            "pub static demo::NAME: &str",
            "pub type demo::Pair<T> = (T, [u8; demo::LIMIT])",
            "pub unsafe fn demo::f<'a, T: Clone>(x: &'a [T], _: (u8, u8)) -> Option<T> where T: 'a",
            "macro_rules! demo::twice { ($x: expr) => { $x + $x }; }",
        ],
    );
}

#[test]
fn structures_tell_their_public_fields_and_whether_there_are_others() {
    lists(
        "pub struct A;
        pub struct B(pub u8, u16);
        #[non_exhaustive] #[derive(Clone)] pub struct C { pub x: u8 }
        pub struct D<T> where T: Send { pub x: T, y: u8 }",
        &[
            "pub struct demo::A",
            "pub struct demo::B(pub u8, _)",
            "#[non_exhaustive] pub struct demo::C {}",
            "impl Clone for demo::C",
            "pub demo::C::x: u8",
            "pub struct demo::D<T> { .. } where T: Send",
            "pub demo::D::x: T",
        ],
    );
}

#[test]
fn variants_are_listed_with_their_fields_and_numbers() {
    lists(
        "use std::io;
        #[derive(Debug, thiserror::Error)]
        #[non_exhaustive]
        pub enum Error {
            Read { path: String, source: io::Error },
            Io(#[from] io::Error),
            Last = 7,
        }",
        &[
            "#[non_exhaustive] pub enum demo::Error",
            "impl From<std::io::Error> for demo::Error",
            "impl std::error::Error for demo::Error",
            "impl std::fmt::Debug for demo::Error",
            "demo::Error::Io(std::io::Error)",
            "demo::Error::Last = 7",
            "demo::Error::Read { path: String, source: std::io::Error }",
        ],
    );
}

#[test]
fn traits_tell_what_an_implementation_must_have() {
    lists(
        "pub trait Device<T>: Send + std::fmt::Debug {
            type Item: Clone;
            const SIZE: usize = 1;
            fn read(&self, to: &mut [u8]) -> Self::Item;
            fn write(&mut self, from: T) {}
        }",
        &[
            "pub trait demo::Device<T>: Send + std::fmt::Debug",
            "pub type demo::Device::Item: Clone",
            "pub const demo::Device::SIZE: usize = ..",
            "pub fn demo::Device::read(&self, to: &mut [u8]) -> Self::Item",
            "pub fn demo::Device::write(&mut self, from: T) { .. }",
        ],
    );
}

#[test]
fn implementations_are_listed_unless_users_cannot_name_what_they_are_of() {
    lists(
        "use std::sync::Mutex;
        pub struct S<T>(T);
        struct Hidden;
        trait Secret {}
        pub trait Open {}
        impl<T: Copy> S<T> {
            pub const N: u8 = 1;
            pub const fn get(self) -> T { self.0 }
            fn private(&self) {}
        }
        impl Iterator for S<u8> { type Item = Mutex<u8>; fn next(&mut self) -> Option<Mutex<u8>> { None } }
        pub struct L<'a>(&'a u8);
        impl<'a> L<'a> { pub fn get(&self) -> &'a u8 { self.0 } }
        impl<T> Secret for S<T> {}
        impl Open for Hidden {}
        impl<T: Open + ?Sized> Open for Box<T> {}
        unsafe impl<T> Send for S<T> {}",
        &[
            "pub struct demo::L<'a>(_)",
            "pub fn demo::L::get(&self) -> &'a u8",
            "pub trait demo::Open",
            "impl<T: demo::Open + ?Sized> demo::Open for Box<T>",
            "pub struct demo::S<T>(_)",
            "impl Iterator for demo::S<u8> { type Item = std::sync::Mutex<u8>; }",
            "unsafe impl<T> Send for demo::S<T>",
            "pub const demo::S::N: u8 in impl<T: Copy> demo::S<T>",
            "pub const fn demo::S::get(self) -> T in impl<T: Copy> demo::S<T>",
        ],
    );
}

#[test]
fn names_are_those_that_users_see_whatever_module_they_are_defined_in() {
    let lines = lines(&[
        (
            "lib.rs",
            "mod inner; pub mod open;
            pub use inner::{Thing, deep::*};
            pub use other_crate::Foreign as Ours;
            pub use inner::Kind::First;",
        ),
        (
            "inner.rs",
            "pub mod deep; use derive_crate::Thing; pub struct Thing; pub enum Kind { First } pub struct Unseen;
            impl Thing { pub fn kind(&self, _: deep::Deep) -> Kind { Kind::First } }",
        ),
        (
            "inner/deep.rs",
            "use super::{self as up, Thing}; pub struct Deep; pub fn make() -> (Thing, up::Kind) { todo!() }",
        ),
        (
            "open/mod.rs",
            "pub use crate::inner::{Kind, Thing as Renamed};",
        ),
    ]);
    assert_eq!(
        lines,
        [
            "pub mod demo",
            "pub struct demo::Deep",
            "pub use demo::open::Kind::First as demo::First",
            "pub use other_crate::Foreign as demo::Ours",
            "pub struct demo::Thing",
            "pub fn demo::Thing::kind(&self, _: demo::Deep) -> demo::open::Kind",
            "pub fn demo::make() -> (demo::Thing, demo::open::Kind)",
            "pub mod demo::open",
            "pub enum demo::open::Kind",
            "demo::open::Kind::First",
            "pub use demo::Thing as demo::open::Renamed",
        ]
    );
}

#[test]
fn features_are_told_and_tests_left_out() {
    lists(
        r#"
        #[cfg(test)] pub mod tests { pub fn x() {} }
        #[cfg(feature = "extra")] pub mod extra { pub struct E; impl E { pub fn f() {} #[cfg(test)] pub fn t() {} } }
        pub struct S;
        #[cfg(feature = "extra")] impl S { #[must_use = "why"] pub fn g() -> u8 { 0 } }
        "#,
        &[
            "pub struct demo::S",
            "#[cfg(feature = \"extra\")] #[must_use] pub fn demo::S::g() -> u8",
            "#[cfg(feature = \"extra\")] pub mod demo::extra",
            "#[cfg(feature = \"extra\")] pub struct demo::extra::E",
            "#[cfg(feature = \"extra\")] pub fn demo::extra::E::f()",
        ],
    );
}

#[test]
fn imports_in_a_circle_end() {
    lists(
        "mod a { pub use super::b::*; pub use super::b::X; } mod b { pub use super::a::*; pub use super::a::X; } pub use a::*;",
        &[
            "pub use super::a::X as demo::X",
            "pub use super::b::X as demo::X",
        ],
    );
}

#[test]
fn a_listing_is_accepted_and_then_agrees() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path().join("api");
    let mut listings = BTreeMap::from([
        ("a.txt".to_owned(), "one\ntwo\n".to_owned()),
        ("b.txt".to_owned(), "three\n".to_owned()),
    ]);
    assert_eq!(changes(&folder, &listings).unwrap().len(), 2);
    bless(&folder, &listings).unwrap();
    assert!(changes(&folder, &listings).unwrap().is_empty());

    listings.insert("a.txt".to_owned(), "one\n2\n".to_owned());
    listings.remove("b.txt");
    assert_eq!(
        changes(&folder, &listings).unwrap(),
        [
            "--- docs/api/a.txt\n+++ the sources\n-two\n+2\n",
            "--- docs/api/b.txt\n+++ the sources\n-three\n",
        ]
    );
    bless(&folder, &listings).unwrap();
    assert!(changes(&folder, &listings).unwrap().is_empty());
    assert!(!folder.join("b.txt").exists());
}

#[test]
fn only_published_libraries_are_listed() {
    let package = |name: &str, publish: &str, kind: &str| {
        format!(
            r#"{{"name":"{name}","publish":{publish},"targets":[{{"kind":["{kind}"],"src_path":"/{name}/src/lib.rs"}}]}}"#
        )
    };
    let packages = [
        package("open", "null", "lib"),
        package("private", "[]", "lib"),
        package("program", "null", "bin"),
    ];
    let metadata = format!(r#"{{"packages":[{}]}}"#, packages.join(","));
    let expected = ("open".to_owned(), PathBuf::from("/open/src/lib.rs"));
    assert_eq!(published(&metadata).unwrap(), [expected]);
    assert!(published(r#"{"packages":[]}"#).is_err());
}
