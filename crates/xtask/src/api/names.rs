//! What a path in the source means.

use std::collections::BTreeMap;

use syn::punctuated::Punctuated;
use syn::visit_mut::{self, VisitMut};
use syn::{Generics, Ident, Item, Path, PathSegment, TypePath};

use super::source::{Crate, Module};

/// The look-ups that are under way: a name that leads to itself leads nowhere.
type UnderWay<'a> = Vec<(usize, &'a str, Space)>;

/// What a path leads to.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Target {
    /// A module of the crate.
    Module(usize),
    /// An item of the crate: its module, and where it is among the items of that.
    Item(usize, usize),
    /// Something of another crate.
    External(Vec<String>),
}

/// The paths by which users reach the items of a crate.
pub(super) type PublicPaths = BTreeMap<Target, Vec<String>>;

/// The space of names that a name is looked up in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Space {
    Types,
    Values,
    Macros,
}

impl Space {
    pub(super) const ALL: [Self; 3] = [Self::Types, Self::Values, Self::Macros];

    fn has(self, item: &Item) -> bool {
        match item {
            Item::Enum(_) | Item::Trait(_) | Item::Type(_) | Item::Union(_) => self == Self::Types,
            // A tuple's constructor is brought by the same imports as its type.
            Item::Struct(_) => self == Self::Types,
            Item::Const(_) | Item::Fn(_) | Item::Static(_) => self == Self::Values,
            Item::Macro(_) => self == Self::Macros,
            _ => false,
        }
    }
}

/// Returns the name that an item is defined by.
pub(super) fn ident(item: &Item) -> Option<&Ident> {
    match item {
        Item::Const(item) => Some(&item.ident),
        Item::Enum(item) => Some(&item.ident),
        Item::Fn(item) => Some(&item.sig.ident),
        Item::Macro(item) => item.ident.as_ref(),
        Item::Static(item) => Some(&item.ident),
        Item::Struct(item) => Some(&item.ident),
        Item::Trait(item) => Some(&item.ident),
        Item::Type(item) => Some(&item.ident),
        Item::Union(item) => Some(&item.ident),
        _ => None,
    }
}

impl Crate {
    /// Returns what `path` leads to in `module`, and how many of its segments lead there. None
    /// where its first segment is not in the module: then it is another crate, or known everywhere.
    pub(super) fn resolve(
        &self,
        module: usize,
        path: &[String],
        space: Space,
    ) -> Option<(Target, usize)> {
        self.resolve_within(module, path, space, &mut Vec::new())
    }

    fn resolve_within<'a>(
        &'a self,
        module: usize,
        path: &'a [String],
        space: Space,
        under_way: &mut UnderWay<'a>,
    ) -> Option<(Target, usize)> {
        let space_at = |at: usize| {
            if at == path.len() {
                space
            } else {
                Space::Types
            }
        };
        let mut target = match path.first()?.as_str() {
            "crate" => Target::Module(0),
            "self" => Target::Module(module),
            "super" => Target::Module(self.modules[module].parent?),
            name => self.find(module, name, space_at(1), under_way)?,
        };
        let mut used = 1;
        while let Some(name) = path.get(used) {
            target = match target {
                Target::Module(at) if name == "super" => Target::Module(self.modules[at].parent?),
                Target::Module(at) => self.find(at, name, space_at(used + 1), under_way)?,
                Target::Item(..) | Target::External(_) => break,
            };
            used += 1;
        }
        Some((target, used))
    }

    /// Finds a name in a module, among what it defines, brings, and brings with an asterisk.
    fn find<'a>(
        &'a self,
        module: usize,
        name: &'a str,
        space: Space,
        under_way: &mut UnderWay<'a>,
    ) -> Option<Target> {
        let this = (module, name, space);
        if under_way.contains(&this) {
            return None;
        }
        under_way.push(this);
        let target = self.find_new(module, name, space, under_way);
        under_way.pop();
        target
    }

    fn find_new<'a>(
        &'a self,
        module: usize,
        name: &'a str,
        space: Space,
        under_way: &mut UnderWay<'a>,
    ) -> Option<Target> {
        let Module {
            children,
            items,
            imports,
            ..
        } = &self.modules[module];
        // Exported macros are at the root, wherever they are defined.
        if space == Space::Macros
            && module == 0
            && let Some(target) = self.find_macro(name)
        {
            return Some(target);
        }
        if space == Space::Types
            && let Some(child) = children.iter().find(|child| child.name == name)
        {
            return Some(Target::Module(child.module));
        }
        let is_it = |item: &Item| space.has(item) && ident(item).is_some_and(|ident| ident == name);
        if let Some(at) = items.iter().position(is_it) {
            return Some(Target::Item(module, at));
        }
        let named = imports
            .iter()
            .filter(|import| import.name.as_deref() == Some(name));
        for import in named {
            if let Some(target) = self.imported(module, &import.path, space, under_way) {
                return Some(target);
            }
        }
        let globs = imports.iter().filter(|import| import.name.is_none());
        globs.into_iter().find_map(|import| {
            let (target, used) =
                self.resolve_within(module, &import.path, Space::Types, under_way)?;
            match target {
                Target::Module(at) if used == import.path.len() && at != module => {
                    self.find(at, name, space, under_way)
                }
                _ => None,
            }
        })
    }

    /// Returns what an import of `path` brings in one of the spaces.
    fn imported<'a>(
        &'a self,
        module: usize,
        path: &'a [String],
        space: Space,
        under_way: &mut UnderWay<'a>,
    ) -> Option<Target> {
        match self.resolve_within(module, path, space, under_way) {
            Some((Target::External(start), used)) => {
                Some(Target::External([&start[..], &path[used..]].concat()))
            }
            Some((target, used)) => (used == path.len()).then_some(target),
            None => {
                let first = path.first()?;
                let is_ours = ["crate", "self", "super"].contains(&first.as_str())
                    || self.find_local(module, first);
                (!is_ours).then(|| Target::External(path.to_vec()))
            }
        }
    }

    /// Returns whether a module or a type of this name is defined in the module.
    fn find_local(&self, module: usize, name: &str) -> bool {
        let module = &self.modules[module];
        let mut children = module.children.iter();
        let mut items = module.items.iter();
        children.any(|child| child.name == name)
            || items.any(|item| {
                Space::Types.has(item) && ident(item).is_some_and(|ident| ident == name)
            })
    }

    fn find_macro(&self, name: &str) -> Option<Target> {
        for (module, contents) in self.modules.iter().enumerate() {
            let is_it = |item: &Item| {
                matches!(item, Item::Macro(item)
                    if item.ident.as_ref().is_some_and(|ident| ident == name)
                        && is_exported(item))
            };
            if let Some(at) = contents.items.iter().position(is_it) {
                return Some(Target::Item(module, at));
            }
        }
        None
    }

    /// Returns the path by which a user would name `target`; that of its definition where there
    /// is none.
    pub(super) fn name(&self, target: &Target, public: &PublicPaths) -> Vec<String> {
        if let Some(path) = public.get(target) {
            return path.clone();
        }
        match target {
            Target::Module(at) => self.modules[*at].path.clone(),
            Target::Item(module, at) => {
                let module = &self.modules[*module];
                let name = module.items.get(*at).and_then(ident);
                let mut path = module.path.clone();
                path.extend(name.map(ToString::to_string));
                path
            }
            Target::External(path) => path.clone(),
        }
    }
}

/// Returns whether a macro can be used outside of its crate.
pub(super) fn is_exported(item: &syn::ItemMacro) -> bool {
    let mut attributes = item.attrs.iter();
    attributes.any(|attribute| attribute.path().is_ident("macro_export"))
}

/// Gives the paths in a piece of source their full names, and notes what they lead to.
pub(super) struct Names<'a> {
    source: &'a Crate,
    module: usize,
    public: &'a PublicPaths,
    parameters: Vec<String>,
    /// Items of the crate that were met.
    pub(super) met: Vec<Target>,
}

impl<'a> Names<'a> {
    pub(super) fn new(source: &'a Crate, module: usize, public: &'a PublicPaths) -> Self {
        Self {
            source,
            module,
            public,
            parameters: Vec::new(),
            met: Vec::new(),
        }
    }

    /// Returns the same with generic parameters, which are not looked up.
    pub(super) fn with(&self, generics: &Generics) -> Self {
        let mut parameters = self.parameters.clone();
        parameters.extend(generics.type_params().map(|it| it.ident.to_string()));
        parameters.extend(generics.const_params().map(|it| it.ident.to_string()));
        Self {
            parameters,
            met: Vec::new(),
            ..*self
        }
    }

    /// Gives a path its full name, and returns how many segments it has more than before, and how
    /// many of those it had are replaced.
    fn rename(&mut self, path: &mut Path) -> Option<(usize, usize)> {
        if path.leading_colon.is_some() {
            return None;
        }
        let names: Vec<String> = path
            .segments
            .iter()
            .map(|it| it.ident.to_string())
            .collect();
        let first = names.first()?;
        if first == "Self" || self.parameters.contains(first) {
            return None;
        }
        let spaces = [Space::Types, Space::Values];
        let (target, used) = spaces
            .into_iter()
            .find_map(|space| self.source.resolve(self.module, &names, space))?;
        let full = self.source.name(&target, self.public);
        self.met.push(target);
        let mut segments = Punctuated::new();
        for name in &full {
            segments.push(syn::parse_str::<PathSegment>(name).ok()?);
        }
        let last: Option<&mut PathSegment> = segments.last_mut();
        if let (Some(last), Some(old)) = (last, path.segments.get(used - 1)) {
            last.arguments = old.arguments.clone();
        }
        segments.extend(path.segments.iter().skip(used).cloned());
        path.segments = segments;
        Some((full.len(), used))
    }
}

impl VisitMut for Names<'_> {
    fn visit_path_mut(&mut self, path: &mut Path) {
        visit_mut::visit_path_mut(self, path);
        self.rename(path);
    }

    fn visit_type_path_mut(&mut self, path: &mut TypePath) {
        let Some(trait_of) = &mut path.qself else {
            visit_mut::visit_type_path_mut(self, path);
            return;
        };
        // `<T as Trait>::Name`: the trait is a part of the path.
        self.visit_type_mut(&mut trait_of.ty);
        for segment in &mut path.path.segments {
            self.visit_path_segment_mut(segment);
        }
        if trait_of.position > 0
            && let Some((now, before)) = self.rename(&mut path.path)
        {
            trait_of.position = trait_of.position + now - before;
        }
    }
}
