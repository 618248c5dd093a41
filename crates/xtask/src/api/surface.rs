//! Which items users of a crate can reach, and by which paths.

use std::collections::{BTreeMap, VecDeque};

use syn::{Item, Visibility};

use super::names::{PublicPaths, Space, Target, ident, is_exported};
use super::source::{self, Crate, Import, is_public};

/// What users of a crate can reach.
#[derive(Debug, Default)]
pub(super) struct Surface {
    /// The shortest path to each module and item.
    pub(super) paths: PublicPaths,
    /// The conditions on those paths.
    pub(super) conditions: BTreeMap<Target, Vec<String>>,
    /// Names that stand for something else: of another crate, or with a shorter path.
    pub(super) others: Vec<Other>,
}

/// A name for something that has another one.
#[derive(Clone, Debug)]
pub(super) struct Other {
    pub(super) path: Vec<String>,
    pub(super) of: Of,
    pub(super) conditions: Vec<String>,
}

/// What a name stands for.
#[derive(Clone, Debug)]
pub(super) enum Of {
    /// This.
    Target(Target),
    /// What follows `target` in a path: a variant of an enum.
    Part(Target, Vec<String>),
}

/// A module to look into.
struct Visit {
    module: usize,
    path: Vec<String>,
    conditions: Vec<String>,
    /// Modules whose names are brought here by an asterisk, each in the one before.
    globs: Vec<usize>,
}

impl Surface {
    /// Finds all that is public in a crate.
    pub(super) fn of(source: &Crate) -> Self {
        let mut this = Self::default();
        let path = source.modules[0].path.clone();
        this.paths.insert(Target::Module(0), path.clone());
        let mut queue = VecDeque::from([Visit {
            module: 0,
            path,
            conditions: Vec::new(),
            globs: Vec::new(),
        }]);
        this.exported_macros(source);
        // Breadth first: what comes first has the shortest path.
        while let Some(visit) = queue.pop_front() {
            this.visit(source, &visit, &mut queue);
        }
        this
    }

    fn exported_macros(&mut self, source: &Crate) {
        for (module, contents) in source.modules.iter().enumerate() {
            for (at, item) in contents.items.iter().enumerate() {
                if let Item::Macro(item) = item
                    && let Some(ident) = item.ident.as_ref().filter(|_| is_exported(item))
                {
                    let path = join(&source.modules[0].path, &ident.to_string());
                    let target = Target::Item(module, at);
                    self.conditions
                        .insert(target.clone(), contents.conditions.clone());
                    self.paths.insert(target, path);
                }
            }
        }
    }

    /// Adds what is in a module, and to `queue` the modules in it.
    fn visit(&mut self, source: &Crate, visit: &Visit, queue: &mut VecDeque<Visit>) {
        let module = &source.modules[visit.module];
        for child in module.children.iter().filter(|child| child.is_public) {
            let of = Target::Module(child.module);
            self.add(source, visit, &child.name, of, &[], queue);
        }
        for (at, item) in module.items.iter().enumerate() {
            if visibility(item).is_some_and(is_public)
                && let Some(ident) = ident(item)
            {
                let of = Target::Item(visit.module, at);
                self.add(source, visit, &ident.to_string(), of, &[], queue);
            }
        }
        for import in module.imports.iter().filter(|import| import.is_public) {
            match &import.name {
                Some(name) => self.import(source, visit, import, name, queue),
                None => self.import_all(source, visit, import, queue),
            }
        }
    }

    /// Adds the name that an import brings.
    fn import(
        &mut self,
        source: &Crate,
        visit: &Visit,
        import: &Import,
        name: &str,
        queue: &mut VecDeque<Visit>,
    ) {
        let mut targets: Vec<Target> = Vec::new();
        for space in Space::ALL {
            let Some((target, used)) = source.resolve(visit.module, &import.path, space) else {
                continue;
            };
            let rest = &import.path[used..];
            let target = match target {
                Target::External(start) => Target::External([&start[..], rest].concat()),
                target if rest.is_empty() => target,
                target => {
                    let of = Of::Part(target, rest.to_vec());
                    return self.other(visit, name, of, &import.conditions);
                }
            };
            targets.push(target);
        }
        // An import that a private module has for itself, such as of a derive macro that is named as a
        // type of the module, is not exported with the type.
        if targets.iter().any(|it| !matches!(it, Target::External(_))) {
            targets.retain(|it| !matches!(it, Target::External(_)));
        }
        if targets.is_empty() {
            targets.push(Target::External(import.path.clone()));
        }
        targets.sort();
        targets.dedup();
        for target in targets {
            self.add(source, visit, name, target, &import.conditions, queue);
        }
    }

    /// Adds all names of what an import with an asterisk is of.
    fn import_all(
        &mut self,
        source: &Crate,
        visit: &Visit,
        import: &Import,
        queue: &mut VecDeque<Visit>,
    ) {
        match source.resolve(visit.module, &import.path, Space::Types) {
            Some((Target::Module(module), used)) if used == import.path.len() => {
                if !visit.globs.contains(&module) {
                    let mut conditions = visit.conditions.clone();
                    union(&mut conditions, &import.conditions);
                    queue.push_front(Visit {
                        module,
                        path: visit.path.clone(),
                        conditions,
                        globs: [&visit.globs[..], &[module]].concat(),
                    });
                }
            }
            Some((target, used)) => {
                let rest = import.path[used..].to_vec();
                let of = Of::Part(target, join(&rest, "*"));
                self.other(visit, "*", of, &import.conditions);
            }
            None => {
                let of = Of::Target(Target::External(join(&import.path, "*")));
                self.other(visit, "*", of, &import.conditions);
            }
        }
    }

    /// Adds `target` by the name that it has in the module.
    fn add(
        &mut self,
        source: &Crate,
        visit: &Visit,
        name: &str,
        target: Target,
        conditions: &[String],
        queue: &mut VecDeque<Visit>,
    ) {
        let path = join(&visit.path, name);
        if matches!(target, Target::External(_)) || self.paths.contains_key(&target) {
            if self.paths.get(&target) != Some(&path) {
                self.other(visit, name, Of::Target(target), conditions);
            }
            return;
        }
        let mut all = visit.conditions.clone();
        union(&mut all, conditions);
        match &target {
            Target::Module(module) => {
                union(&mut all, &source.modules[*module].conditions);
                queue.push_back(Visit {
                    module: *module,
                    path: path.clone(),
                    conditions: all.clone(),
                    globs: Vec::new(),
                });
            }
            Target::Item(module, at) => {
                let module = &source.modules[*module];
                union(&mut all, &module.conditions);
                source::add_conditions(&mut all, source::attributes(&module.items[*at]));
            }
            Target::External(_) => {}
        }
        self.conditions.insert(target.clone(), all);
        self.paths.insert(target, path);
    }

    fn other(&mut self, visit: &Visit, name: &str, of: Of, conditions: &[String]) {
        let mut all = visit.conditions.clone();
        union(&mut all, conditions);
        self.others.push(Other {
            path: join(&visit.path, name),
            of,
            conditions: all,
        });
    }
}

fn visibility(item: &Item) -> Option<&Visibility> {
    match item {
        Item::Const(item) => Some(&item.vis),
        Item::Enum(item) => Some(&item.vis),
        Item::Fn(item) => Some(&item.vis),
        Item::Static(item) => Some(&item.vis),
        Item::Struct(item) => Some(&item.vis),
        Item::Trait(item) => Some(&item.vis),
        Item::Type(item) => Some(&item.vis),
        Item::Union(item) => Some(&item.vis),
        _ => None,
    }
}

/// Returns `path` with one more name.
pub(super) fn join(path: &[String], name: &str) -> Vec<String> {
    let mut path = path.to_vec();
    path.push(name.to_owned());
    path
}

/// Adds to `conditions` those of `more` that it lacks.
pub(super) fn union(conditions: &mut Vec<String>, more: &[String]) {
    for condition in more {
        if !conditions.contains(condition) {
            conditions.push(condition.clone());
        }
    }
}
