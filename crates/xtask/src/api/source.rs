//! The modules of a crate, read from its files.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use syn::{Attribute, Item, ItemMod, UseTree, Visibility};

use super::print::text;

/// A crate as its source says.
pub(super) struct Crate {
    /// The modules; the first is the root.
    pub(super) modules: Vec<Module>,
}

/// A module and what is in it.
pub(super) struct Module {
    /// The path of its definition, the crate's name first.
    pub(super) path: Vec<String>,
    /// The module that it is in.
    pub(super) parent: Option<usize>,
    /// The conditions that it and those around it are compiled under.
    pub(super) conditions: Vec<String>,
    /// Its items, but modules and imports.
    pub(super) items: Vec<Item>,
    /// The modules in it.
    pub(super) children: Vec<Child>,
    /// What its `use` declarations bring.
    pub(super) imports: Vec<Import>,
}

/// A module in a module.
pub(super) struct Child {
    pub(super) name: String,
    pub(super) is_public: bool,
    pub(super) module: usize,
}

/// One name, or all names of a module, that a `use` declaration brings.
pub(super) struct Import {
    /// The path of what is brought.
    pub(super) path: Vec<String>,
    /// The name it gets; none where all names of `path` are brought.
    pub(super) name: Option<String>,
    pub(super) is_public: bool,
    pub(super) conditions: Vec<String>,
}

impl Crate {
    /// Reads the crate `name` whose root is the file `root`, without what is for its tests.
    pub(super) fn read(name: &str, root: &Path) -> Result<Self> {
        let mut this = Self {
            modules: Vec::new(),
        };
        let folder = root.parent().context("find the folder of a crate")?;
        let module = Module::new(vec![name.to_owned()], None, Vec::new());
        this.add(module, parse(root)?.items, folder)?;
        Ok(this)
    }

    /// Adds a module with its items, and those of its modules whose files are in `folder`.
    fn add(&mut self, module: Module, items: Vec<Item>, folder: &Path) -> Result<usize> {
        let at = self.modules.len();
        let path = module.path.clone();
        let inherited = module.conditions.clone();
        self.modules.push(module);
        for item in items {
            if is_for_tests(attributes(&item)) {
                continue;
            }
            match item {
                Item::Mod(item) => {
                    let name = item.ident.to_string();
                    let mut conditions = inherited.clone();
                    add_conditions(&mut conditions, &item.attrs);
                    let is_public = is_public(&item.vis);
                    let mut path = path.clone();
                    path.push(name.clone());
                    let (items, folder) = contents(item, folder)?;
                    let child = Module::new(path, Some(at), conditions);
                    let module = self.add(child, items, &folder)?;
                    self.modules[at].children.push(Child {
                        name,
                        is_public,
                        module,
                    });
                }
                Item::Use(item) => {
                    let mut conditions = Vec::new();
                    add_conditions(&mut conditions, &item.attrs);
                    let import = Import {
                        path: Vec::new(),
                        name: None,
                        is_public: is_public(&item.vis),
                        conditions,
                    };
                    flatten(&item.tree, &import, &mut self.modules[at].imports);
                }
                Item::ForeignMod(_) | Item::Verbatim(_) | Item::TraitAlias(_) => bail!(
                    "{}: the listing of public interfaces cannot tell `{}`",
                    path.join("::"),
                    text(&item)
                ),
                item => self.modules[at].items.push(item),
            }
        }
        Ok(at)
    }
}

impl Module {
    fn new(path: Vec<String>, parent: Option<usize>, conditions: Vec<String>) -> Self {
        Self {
            path,
            parent,
            conditions,
            items: Vec::new(),
            children: Vec::new(),
            imports: Vec::new(),
        }
    }
}

fn parse(file: &Path) -> Result<syn::File> {
    let source = fs::read_to_string(file).with_context(|| format!("read {}", file.display()))?;
    syn::parse_file(&source).with_context(|| format!("parse {}", file.display()))
}

/// Returns the items of a module that is declared in a file whose modules are in `folder`, and the
/// folder of its own modules.
fn contents(item: ItemMod, folder: &Path) -> Result<(Vec<Item>, PathBuf)> {
    let name = item.ident.to_string();
    let inner = folder.join(&name);
    if let Some((_, items)) = item.content {
        return Ok((items, inner));
    }
    let is_elsewhere = item.attrs.iter().any(|it| it.path().is_ident("path"));
    ensure!(!is_elsewhere, "module {name}: `path` is not understood");
    let beside = folder.join(format!("{name}.rs"));
    let file = if beside.is_file() {
        beside
    } else {
        inner.join("mod.rs")
    };
    Ok((parse(&file)?.items, inner))
}

/// Adds to `imports` what `tree` brings; `stem` is what is known before it.
fn flatten(tree: &UseTree, stem: &Import, imports: &mut Vec<Import>) {
    let import = |last: Option<&syn::Ident>, name: Option<String>| {
        let mut path = stem.path.clone();
        // `a::{self}` is `a`.
        path.extend(last.map(ToString::to_string).filter(|it| it != "self"));
        Import {
            name: name.map(|name| match (name.as_str(), path.last()) {
                ("self", Some(last)) => last.clone(),
                _ => name,
            }),
            path,
            is_public: stem.is_public,
            conditions: stem.conditions.clone(),
        }
    };
    match tree {
        UseTree::Path(tree) => {
            let mut path = stem.path.clone();
            path.push(tree.ident.to_string());
            let stem = Import {
                path,
                name: None,
                is_public: stem.is_public,
                conditions: stem.conditions.clone(),
            };
            flatten(&tree.tree, &stem, imports);
        }
        UseTree::Group(group) => {
            for tree in &group.items {
                flatten(tree, stem, imports);
            }
        }
        UseTree::Name(tree) => {
            imports.push(import(Some(&tree.ident), Some(tree.ident.to_string())))
        }
        UseTree::Rename(tree) => {
            imports.push(import(Some(&tree.ident), Some(tree.rename.to_string())));
        }
        UseTree::Glob(_) => imports.push(import(None, None)),
    }
}

/// Returns the attributes of an item.
pub(super) fn attributes(item: &Item) -> &[Attribute] {
    match item {
        Item::Const(item) => &item.attrs,
        Item::Enum(item) => &item.attrs,
        Item::ExternCrate(item) => &item.attrs,
        Item::Fn(item) => &item.attrs,
        Item::ForeignMod(item) => &item.attrs,
        Item::Impl(item) => &item.attrs,
        Item::Macro(item) => &item.attrs,
        Item::Mod(item) => &item.attrs,
        Item::Static(item) => &item.attrs,
        Item::Struct(item) => &item.attrs,
        Item::Trait(item) => &item.attrs,
        Item::Type(item) => &item.attrs,
        Item::Union(item) => &item.attrs,
        Item::Use(item) => &item.attrs,
        _ => &[],
    }
}

pub(super) fn is_public(visibility: &Visibility) -> bool {
    matches!(visibility, Visibility::Public(_))
}

/// Returns whether something is compiled for the crate's own tests only.
pub(super) fn is_for_tests(attributes: &[Attribute]) -> bool {
    let conditions = attributes.iter().filter_map(condition);
    conditions.into_iter().any(|it| it == "#[cfg(test)]")
}

/// Adds the conditions among `attributes` to those that are in `conditions`.
pub(super) fn add_conditions(conditions: &mut Vec<String>, attributes: &[Attribute]) {
    for condition in attributes.iter().filter_map(condition) {
        if !conditions.contains(&condition) {
            conditions.push(condition);
        }
    }
}

fn condition(attribute: &Attribute) -> Option<String> {
    attribute.path().is_ident("cfg").then(|| text(attribute))
}
