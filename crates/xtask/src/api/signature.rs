//! The signatures of items as text, with the full names of all that they speak of.

use syn::visit_mut::VisitMut;
use syn::{Attribute, Field, Fields, FnArg, Generics, Pat, ReturnType, Safety, Signature, Variant};

use super::names::Names;
use super::print::text;
use super::source::is_public;

/// Attributes that are a part of the interface.
const SHOWN: [&str; 4] = ["deprecated", "must_use", "non_exhaustive", "repr"];

/// Returns the attributes among `attributes` that are a part of the interface, and a space after
/// each.
pub(super) fn shown(attributes: &[Attribute]) -> String {
    let mut shown: Vec<String> = Vec::new();
    for attribute in attributes {
        let path = attribute.path();
        if path.is_ident("must_use") || path.is_ident("deprecated") {
            // Their texts are for people.
            shown.push(format!("#[{}] ", text(path)));
        } else if SHOWN.iter().any(|name| path.is_ident(name)) || is_hidden(attribute) {
            shown.push(format!("{} ", text(attribute)));
        }
    }
    shown.sort();
    shown.concat()
}

fn is_hidden(attribute: &Attribute) -> bool {
    attribute.path().is_ident("doc") && text(attribute) == "#[doc(hidden)]"
}

/// Returns `fn path(…) -> …` with all that belongs to it.
pub(super) fn function(signature: &Signature, path: &str, names: &Names<'_>) -> String {
    let mut signature = signature.clone();
    for input in &mut signature.inputs {
        plain(input);
    }
    names
        .with(&signature.generics)
        .visit_signature_mut(&mut signature);
    let mut line = String::new();
    for (is_it, word) in [
        (signature.constness.is_some(), "const "),
        (signature.asyncness.is_some(), "async "),
        (matches!(signature.safety, Safety::Unsafe(_)), "unsafe "),
    ] {
        line.push_str(if is_it { word } else { "" });
    }
    if let Some(abi) = &signature.abi {
        line.push_str(&format!("{} ", text(abi)));
    }
    let mut inputs: Vec<String> = signature.inputs.iter().map(text).collect();
    inputs.extend(signature.variadic.as_ref().map(text));
    let generics = text(&signature.generics);
    line.push_str(&format!("fn {path}{generics}({})", inputs.join(", ")));
    if let ReturnType::Type(_, to) = &signature.output {
        line.push_str(&format!(" -> {}", text(to)));
    }
    line.push_str(&conditions(&signature.generics));
    line
}

/// Takes away what a function does with an argument, which is no business of its callers.
fn plain(input: &mut FnArg) {
    match input {
        FnArg::Receiver(receiver) => {
            receiver.attrs.clear();
            receiver.mutability = None;
        }
        FnArg::Typed(argument) => {
            argument.attrs.clear();
            if let Pat::Ident(name) = &mut *argument.pat {
                name.mutability = None;
                name.by_ref = None;
                name.subpat = None;
            } else {
                *argument.pat = Pat::Wild(syn::PatWild {
                    attrs: Vec::new(),
                    underscore_token: syn::token::Underscore::default(),
                });
            }
        }
    }
}

/// Returns the `where` clause, and a space before it.
pub(super) fn conditions(generics: &Generics) -> String {
    let Some(clause) = &generics.where_clause else {
        return String::new();
    };
    let predicates: Vec<String> = clause.predicates.iter().map(text).collect();
    if predicates.is_empty() {
        return String::new();
    }
    format!(" where {}", predicates.join(", "))
}

/// Returns what follows a structure's name and parameters: its fields that have no names, and
/// whether there are any that users cannot see.
pub(super) fn fields(fields: &Fields, names: &mut Names<'_>) -> String {
    match fields {
        Fields::Unit => String::new(),
        Fields::Named(fields) if fields.named.iter().all(|field| is_public(&field.vis)) => {
            " {}".to_owned()
        }
        Fields::Named(_) => " { .. }".to_owned(),
        Fields::Unnamed(fields) => {
            let mut types = Vec::new();
            for field in &fields.unnamed {
                types.push(if is_public(&field.vis) {
                    format!("pub {}", field_type(field, names))
                } else {
                    "_".to_owned()
                });
            }
            format!("({})", types.join(", "))
        }
    }
}

/// Returns the type of a field.
pub(super) fn field_type(field: &Field, names: &mut Names<'_>) -> String {
    let mut of = field.ty.clone();
    names.visit_type_mut(&mut of);
    text(of)
}

/// Returns what follows the name of a variant: its fields and its number.
pub(super) fn variant(variant: &Variant, names: &mut Names<'_>) -> String {
    let mut parts = Vec::new();
    for field in &variant.fields {
        let of = field_type(field, names);
        parts.push(match &field.ident {
            Some(name) => format!("{name}: {of}"),
            None => of,
        });
    }
    let mut line = match &variant.fields {
        Fields::Unit => String::new(),
        Fields::Named(_) => format!(" {{ {} }}", parts.join(", ")),
        Fields::Unnamed(_) => format!("({})", parts.join(", ")),
    };
    if let Some((_, number)) = &variant.discriminant {
        line.push_str(&format!(" = {}", text(number)));
    }
    line
}
