//! The lines of a listing.

use anyhow::{Result, bail};
use quote::ToTokens;
use syn::punctuated::Punctuated;
use syn::visit_mut::VisitMut;
use syn::{
    Attribute, Fields, GenericArgument, Generics, ImplItem, Item, ItemEnum, ItemImpl, ItemTrait,
    Meta, Path, PathArguments, Token, TraitItem, Type,
};

use super::names::{Names, Space, Target};
use super::print::text;
use super::signature::{conditions, field_type, fields, function, shown, variant};
use super::source::{Crate, add_conditions, is_for_tests, is_public};
use super::surface::{Of, Surface, join, union};

/// How many aliases may lead to one another.
const MAX_ALIASES: usize = 8;

/// Traits that are derived by a name that no module has to bring, where an implementation by hand
/// has to name them in full.
const DERIVED: [(&str, &str); 2] = [("Debug", "std::fmt::Debug"), ("Hash", "std::hash::Hash")];

/// Returns the public interface of a crate, a line an item, sorted by the items' paths.
pub(super) fn listing(source: &Crate) -> Result<String> {
    let surface = Surface::of(source);
    let mut list = List {
        source,
        surface: &surface,
        lines: Vec::new(),
    };
    for (target, path) in &surface.paths {
        match target {
            Target::Module(_) => {
                let line = format!("pub mod {}", path.join("::"));
                list.push(path.clone(), list.conditions(target), line);
            }
            Target::Item(module, at) => {
                list.item(target, *module, &source.modules[*module].items[*at])?;
            }
            Target::External(_) => {}
        }
    }
    list.others();
    for (at, module) in source.modules.iter().enumerate() {
        for item in &module.items {
            match item {
                Item::Impl(item) => list.implementation(at, item)?,
                Item::Macro(item) if item.ident.is_none() => list.call(at, item),
                _ => {}
            }
        }
    }
    list.lines.sort();
    list.lines.dedup();
    let lines: Vec<String> = list
        .lines
        .into_iter()
        .map(|line| line.text + "\n")
        .collect();
    Ok(lines.concat())
}

/// A line, and where it stands.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Line {
    path: Vec<String>,
    /// What is implemented for an item comes after it.
    is_implementation: bool,
    text: String,
}

struct List<'a> {
    source: &'a Crate,
    surface: &'a Surface,
    lines: Vec<Line>,
}

impl<'a> List<'a> {
    fn push(&mut self, path: Vec<String>, conditions: Vec<String>, line: String) {
        let mut text = String::new();
        for condition in conditions {
            text.push_str(&condition);
            text.push(' ');
        }
        text.push_str(&line);
        let is_implementation = line.starts_with("impl") || line.starts_with("unsafe impl");
        self.lines.push(Line {
            path,
            is_implementation,
            text,
        });
    }

    fn conditions(&self, target: &Target) -> Vec<String> {
        let conditions = self.surface.conditions.get(target);
        conditions.cloned().unwrap_or_default()
    }

    fn names(&self, module: usize) -> Names<'a> {
        Names::new(self.source, module, &self.surface.paths)
    }

    /// Adds names that stand for something else.
    fn others(&mut self) {
        for other in &self.surface.others {
            let of = match &other.of {
                Of::Target(target) => self.source.name(target, &self.surface.paths),
                Of::Part(target, rest) => {
                    let path = self.source.name(target, &self.surface.paths);
                    [&path[..], rest].concat()
                }
            };
            let line = format!("pub use {} as {}", of.join("::"), other.path.join("::"));
            self.push(other.path.clone(), other.conditions.clone(), line);
        }
    }

    /// Adds an item and what is in it.
    fn item(&mut self, target: &Target, module: usize, item: &Item) -> Result<()> {
        let path = self.source.name(target, &self.surface.paths);
        let name = path.join("::");
        let mut names = self.names(module);
        let line = match item {
            Item::Const(item) => format!("const {name}: {}", renamed(&item.ty, &mut names)),
            Item::Static(item) => {
                let mutability = text(&item.mutability);
                let space = if mutability.is_empty() { "" } else { " " };
                let of = renamed(&item.ty, &mut names);
                format!("static {mutability}{space}{name}: {of}")
            }
            Item::Fn(item) => function(&item.sig, &name, &names),
            Item::Type(item) => {
                let mut names = names.with(&item.generics);
                let generics = renamed_generics(&item.generics, &mut names);
                let of = renamed(&item.ty, &mut names);
                format!(
                    "type {name}{}{} = {of}",
                    text(&generics),
                    conditions(&generics)
                )
            }
            Item::Struct(item) => {
                self.fields(target, module, &item.generics, &item.fields);
                self.derived(target, module, &item.generics, &item.attrs)?;
                let mut names = names.with(&item.generics);
                let generics = renamed_generics(&item.generics, &mut names);
                let fields = fields(&item.fields, &mut names);
                let (parameters, conditions) = (text(&generics), conditions(&generics));
                format!("struct {name}{parameters}{fields}{conditions}")
            }
            Item::Union(item) => {
                let fields = Fields::Named(item.fields.clone());
                self.fields(target, module, &item.generics, &fields);
                self.derived(target, module, &item.generics, &item.attrs)?;
                let generics = renamed_generics(&item.generics, &mut names.with(&item.generics));
                format!("union {name}{}{}", text(&generics), conditions(&generics))
            }
            Item::Enum(item) => self.enumeration(target, module, item)?,
            Item::Trait(item) => self.interface(target, module, item)?,
            Item::Macro(item) => {
                let line = format!("macro_rules! {name} {{ {} }}", text(&item.mac.tokens));
                let line = format!("{}{line}", shown(&item.attrs));
                self.push(path, self.conditions(target), line);
                return Ok(());
            }
            _ => bail!("the listing cannot tell {name}"),
        };
        let line = format!("{}pub {line}", shown(super::source::attributes(item)));
        self.push(path, self.conditions(target), line);
        Ok(())
    }

    fn fields(&mut self, target: &Target, module: usize, generics: &Generics, fields: &Fields) {
        let mut names = self.names(module).with(generics);
        for field in fields.iter().filter(|field| is_public(&field.vis)) {
            let Some(ident) = &field.ident else {
                continue;
            };
            let path = join(
                &self.source.name(target, &self.surface.paths),
                &ident.to_string(),
            );
            let mut conditions = self.conditions(target);
            add_conditions(&mut conditions, &field.attrs);
            let of = field_type(field, &mut names);
            let line = format!("{}pub {}: {of}", shown(&field.attrs), path.join("::"));
            self.push(path, conditions, line);
        }
    }

    fn enumeration(&mut self, target: &Target, module: usize, item: &ItemEnum) -> Result<String> {
        let name = self.source.name(target, &self.surface.paths);
        let mut names = self.names(module).with(&item.generics);
        for each in &item.variants {
            let path = join(&name, &each.ident.to_string());
            let mut conditions = self.conditions(target);
            add_conditions(&mut conditions, &each.attrs);
            let rest = variant(each, &mut names);
            let line = format!("{}{}{rest}", shown(&each.attrs), path.join("::"));
            self.push(path, conditions, line);
            for field in &each.fields {
                if field.attrs.iter().any(|it| it.path().is_ident("from")) {
                    let of = field_type(field, &mut names);
                    let line = format!("impl From<{of}>");
                    self.implemented(target, module, &item.generics, &line);
                }
            }
        }
        self.derived(target, module, &item.generics, &item.attrs)?;
        let generics = renamed_generics(&item.generics, &mut names);
        let (parameters, conditions) = (text(&generics), conditions(&generics));
        Ok(format!("enum {}{parameters}{conditions}", name.join("::")))
    }

    fn interface(&mut self, target: &Target, module: usize, item: &ItemTrait) -> Result<String> {
        let name = self.source.name(target, &self.surface.paths);
        let mut names = self.names(module).with(&item.generics);
        for each in &item.items {
            let (path, attributes, line) = match each {
                TraitItem::Fn(each) => {
                    let path = join(&name, &each.sig.ident.to_string());
                    let mut line = function(&each.sig, &path.join("::"), &names);
                    // What an implementation need not have.
                    line.push_str(if each.default.is_some() {
                        " { .. }"
                    } else {
                        ""
                    });
                    (path, &each.attrs, line)
                }
                TraitItem::Const(each) => {
                    let path = join(&name, &each.ident.to_string());
                    let of = renamed(&each.ty, &mut names);
                    let default = if each.default.is_some() { " = .." } else { "" };
                    let line = format!("const {}: {of}{default}", path.join("::"));
                    (path, &each.attrs, line)
                }
                TraitItem::Type(each) => {
                    let path = join(&name, &each.ident.to_string());
                    let mut each = each.clone();
                    names
                        .with(&each.generics)
                        .visit_trait_item_type_mut(&mut each);
                    each.attrs.clear();
                    let line = text(&each).replacen(
                        &format!("type {}", each.ident),
                        &format!("type {}", path.join("::")),
                        1,
                    );
                    let line = line.trim_end_matches(';').to_owned();
                    self.push(path, self.conditions(target), format!("pub {line}"));
                    continue;
                }
                _ => bail!(
                    "the listing cannot tell `{}` in {}",
                    text(each),
                    name.join("::")
                ),
            };
            let mut conditions = self.conditions(target);
            add_conditions(&mut conditions, attributes);
            self.push(path, conditions, format!("{}pub {line}", shown(attributes)));
        }
        let mut item = item.clone();
        item.supertraits
            .iter_mut()
            .for_each(|bound| names.visit_type_param_bound_mut(bound));
        let generics = renamed_generics(&item.generics, &mut names);
        let safety = if item.unsafety.is_some() {
            "unsafe "
        } else {
            ""
        };
        let mut line = format!("{safety}trait {}{}", name.join("::"), text(&generics));
        if !item.supertraits.is_empty() {
            let bounds: Vec<String> = item.supertraits.iter().map(text).collect();
            line.push_str(&format!(": {}", bounds.join(" + ")));
        }
        line.push_str(&conditions(&generics));
        Ok(line)
    }

    /// Adds the traits that are derived for a type.
    fn derived(
        &mut self,
        target: &Target,
        module: usize,
        generics: &Generics,
        attributes: &[Attribute],
    ) -> Result<()> {
        for attribute in attributes.iter().filter(|it| it.path().is_ident("derive")) {
            let Meta::List(list) = &attribute.meta else {
                continue;
            };
            let paths = list.parse_args_with(Punctuated::<Path, Token![,]>::parse_terminated)?;
            for path in paths {
                let name = text(&path);
                let known = DERIVED.iter().find(|(derived, _)| *derived == name);
                let name = match known {
                    Some((_, full)) => (*full).to_owned(),
                    None => self.derive_name(module, &path),
                };
                self.implemented(target, module, generics, &format!("impl {name}"));
            }
        }
        Ok(())
    }

    /// Returns the full name of a derived trait. Imports come first, since a module can have a type
    /// of the same name.
    fn derive_name(&self, module: usize, path: &Path) -> String {
        let name = text(path);
        let mut imports = self.source.modules[module].imports.iter();
        let import = imports.find(|import| import.name.as_ref() == Some(&name));
        let full = import.map_or(name, |import| import.path.join("::"));
        match full.as_str() {
            "thiserror::Error" => "std::error::Error".to_owned(),
            _ => full,
        }
    }

    /// Adds that a type has a trait; `line` is as `impl Trait`.
    fn implemented(&mut self, target: &Target, module: usize, generics: &Generics, line: &str) {
        let path = self.source.name(target, &self.surface.paths);
        let mut names = self.names(module).with(generics);
        let generics = renamed_generics(generics, &mut names);
        let (parameters, arguments, conditions) = generics.split_for_impl();
        let line = line.strip_prefix("impl").unwrap_or(line);
        let (parameters, arguments) = (text(parameters), text(arguments));
        let conditions = conditions
            .map(|it| format!(" {}", text(it)))
            .unwrap_or_default();
        let name = path.join("::");
        let line = format!("impl{parameters}{line} for {name}{arguments}{conditions}");
        self.push(path, self.conditions(target), line);
    }

    /// Adds an `impl` block: of a trait as one line, of a type as a line for each item in it.
    fn implementation(&mut self, module: usize, item: &ItemImpl) -> Result<()> {
        let mut item = item.clone();
        let original = item.self_ty.clone();
        let mut names = self.names(module).with(&item.generics);
        item.attrs.retain(|it| !it.path().is_ident("doc"));
        names.visit_generics_mut(&mut item.generics);
        names.met.clear();
        names.visit_type_mut(&mut item.self_ty);
        if let Some((path, _)) = &mut item.trait_ {
            names.visit_path_mut(path);
        }
        // What users cannot name is no matter of theirs.
        let mut met = names.met.iter().filter(|it| matches!(it, Target::Item(..)));
        if met.any(|target| !self.is_public(target)) {
            return Ok(());
        }
        let mut conditions = self.source.modules[module].conditions.clone();
        add_conditions(&mut conditions, &item.attrs);
        let owner = self.owner(module, &original);
        if item.trait_.is_some() {
            let first = names.met.iter().find(|it| matches!(it, Target::Item(..)));
            let Some(target) = owner.as_ref().or(first) else {
                return Ok(());
            };
            let path = self.source.name(target, &self.surface.paths);
            let line = self.of_trait(module, &item);
            self.push(path, conditions, line);
            return Ok(());
        }
        match owner {
            Some(target) => self.of_type(&target, module, &item, &conditions),
            None => bail!("the listing cannot tell `{}`", header(&item)),
        }
    }

    /// Returns whether users can name an item, or only an alias of it.
    fn is_public(&self, target: &Target) -> bool {
        self.surface.paths.contains_key(target)
    }

    /// Returns the item that an `impl` block for `of` is about, when it is one of the crate's.
    fn owner(&self, module: usize, of: &Type) -> Option<Target> {
        let Type::Path(path) = of else {
            return None;
        };
        let mut names: Vec<String> = Vec::new();
        names.extend(path.path.segments.iter().map(|it| it.ident.to_string()));
        let (mut target, _) = self.source.resolve(module, &names, Space::Types)?;
        for _ in 0..MAX_ALIASES {
            let Target::Item(module, at) = target else {
                return None;
            };
            match &self.source.modules[module].items[at] {
                Item::Type(alias) => {
                    let Type::Path(path) = &*alias.ty else {
                        return None;
                    };
                    let segments = path.path.segments.iter();
                    let names: Vec<String> = segments.map(|it| it.ident.to_string()).collect();
                    target = self.source.resolve(module, &names, Space::Types)?.0;
                }
                _ => return Some(Target::Item(module, at)),
            }
        }
        None
    }

    /// Returns the line for the implementation of a trait.
    fn of_trait(&self, module: usize, item: &ItemImpl) -> String {
        let mut line = header(item);
        let mut types = Vec::new();
        for each in &item.items {
            if let ImplItem::Type(each) = each {
                let mut names = self.names(module).with(&item.generics).with(&each.generics);
                let of = renamed(&each.ty, &mut names);
                types.push(format!(
                    "type {}{} = {of};",
                    each.ident,
                    text(&each.generics)
                ));
            }
        }
        if !types.is_empty() {
            line.push_str(&format!(" {{ {} }}", types.join(" ")));
        }
        line
    }

    /// Adds the public items of an `impl` block of a type.
    fn of_type(
        &mut self,
        target: &Target,
        module: usize,
        item: &ItemImpl,
        conditions: &[String],
    ) -> Result<()> {
        let name = self.source.name(target, &self.surface.paths);
        let mut names = self.names(module).with(&item.generics);
        let block = header(item);
        let block = if says_more(item) {
            format!(" in {block}")
        } else {
            String::new()
        };
        for each in &item.items {
            let (path, attributes, line) = match each {
                ImplItem::Fn(each) if is_public(&each.vis) => {
                    let path = join(&name, &each.sig.ident.to_string());
                    let line = function(&each.sig, &path.join("::"), &names);
                    (path, &each.attrs, line)
                }
                ImplItem::Const(each) if is_public(&each.vis) => {
                    let path = join(&name, &each.ident.to_string());
                    let of = renamed(&each.ty, &mut names);
                    let line = format!("const {}: {of}", path.join("::"));
                    (path, &each.attrs, line)
                }
                ImplItem::Fn(_) | ImplItem::Const(_) => continue,
                _ => bail!(
                    "the listing cannot tell `{}` in {}",
                    text(each),
                    name.join("::")
                ),
            };
            if is_for_tests(attributes) {
                continue;
            }
            let mut conditions = conditions.to_vec();
            union(&mut conditions, &self.conditions(target));
            add_conditions(&mut conditions, attributes);
            self.push(
                path,
                conditions,
                format!("{}pub {line}{block}", shown(attributes)),
            );
        }
        Ok(())
    }

    /// Adds the call of a macro, which may define anything.
    fn call(&mut self, module: usize, item: &syn::ItemMacro) {
        let path = &self.source.modules[module].path;
        let name = text(&item.mac.path);
        // It defines nothing public unless it says `pub`.
        let tokens = text(&item.mac.tokens);
        if name != "thread_local" || tokens.contains("pub ") {
            let line = format!("{}: {name}! {{ {tokens} }}", path.join("::"));
            self.push(path.clone(), Vec::new(), line);
        }
    }
}

/// Returns whether an `impl` block of a type says more than which type it is of: parameters,
/// conditions or arguments, but for lifetimes.
fn says_more(item: &ItemImpl) -> bool {
    let Type::Path(path) = &*item.self_ty else {
        return true;
    };
    let arguments = path.path.segments.last().map(|last| &last.arguments);
    let is_lifetime = |argument: &GenericArgument| matches!(argument, GenericArgument::Lifetime(_));
    let has_arguments = match arguments {
        Some(PathArguments::AngleBracketed(list)) => !list.args.iter().all(is_lifetime),
        Some(PathArguments::Parenthesized(_)) => true,
        _ => false,
    };
    let lifetimes = item.generics.lifetimes();
    has_arguments
        || item.generics.where_clause.is_some()
        || lifetimes.count() < item.generics.params.len()
}

/// Returns what an `impl` block begins with.
fn header(item: &ItemImpl) -> String {
    let mut line = String::new();
    line.push_str(if item.unsafety.is_some() {
        "unsafe "
    } else {
        ""
    });
    line.push_str(&format!("impl{} ", text(&item.generics)));
    if let Some((path, _)) = &item.trait_ {
        line.push_str(if item.modifiers.polarity.is_some() {
            "!"
        } else {
            ""
        });
        line.push_str(&format!("{} for ", text(path)));
    }
    line.push_str(&text(&item.self_ty));
    line.push_str(&conditions(&item.generics));
    line
}

/// Returns the text of a type with full names.
fn renamed(of: &Type, names: &mut Names<'_>) -> String {
    let mut of = of.clone();
    names.visit_type_mut(&mut of);
    text(of.to_token_stream())
}

fn renamed_generics(generics: &Generics, names: &mut Names<'_>) -> Generics {
    let mut generics = generics.clone();
    names.visit_generics_mut(&mut generics);
    generics
}
