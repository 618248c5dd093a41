//! Tokens as text: on one line, spaced as rustfmt does, however the source is broken into lines.

use proc_macro2::{Delimiter, Spacing, TokenStream, TokenTree};
use quote::ToTokens;

/// Operators of more than one character that stand in signatures.
const OPERATORS: [&str; 6] = ["...", "..=", "..", "::", "->", "=>"];

/// Words that a parenthesis stands apart from.
const KEYWORDS: [&str; 9] = [
    "as", "const", "dyn", "for", "impl", "in", "mut", "pub", "where",
];

/// Returns the text of `node`.
pub(super) fn text(node: impl ToTokens) -> String {
    let mut words = Vec::new();
    split(node.to_token_stream(), &mut words);
    let mut text = String::new();
    for (at, word) in words.iter().enumerate() {
        let before = at.checked_sub(1).map(|at| words[at].as_str());
        if before.is_some_and(|before| is_apart(before, word)) {
            text.push(' ');
        }
        text.push_str(word);
    }
    text
}

/// Splits `tokens` into words, and leaves out the commas that rustfmt puts at the end of a list when
/// it breaks it into lines.
fn split(tokens: TokenStream, words: &mut Vec<String>) {
    let mut tokens = tokens.into_iter().peekable();
    while let Some(token) = tokens.next() {
        match token {
            TokenTree::Group(group) => {
                let (open, close) = match group.delimiter() {
                    Delimiter::Parenthesis => ("(", ")"),
                    Delimiter::Brace => ("{", "}"),
                    Delimiter::Bracket => ("[", "]"),
                    Delimiter::None => ("", ""),
                };
                let is_list = words.last().is_some_and(|word| is_called(word));
                words.push(open.to_owned());
                let begin = words.len();
                split(group.stream(), words);
                let is_tuple_of_one = open == "(" && !is_list && commas(&words[begin..]) == 1;
                if !is_tuple_of_one {
                    drop_comma(words);
                }
                words.push(close.to_owned());
                words.retain(|word| !word.is_empty());
            }
            TokenTree::Punct(punct) => {
                let mut word = punct.as_char().to_string();
                let mut is_joint = punct.spacing() == Spacing::Joint;
                // What follows a quote is the name of a lifetime.
                if word == "'" {
                    word.extend(tokens.next().map(|name| name.to_string()));
                    is_joint = false;
                }
                while let Some(TokenTree::Punct(next)) = tokens.peek()
                    && is_joint
                    && is_operator(&format!("{word}{}", next.as_char()))
                {
                    word.push(next.as_char());
                    is_joint = next.spacing() == Spacing::Joint;
                    tokens.next();
                }
                if word == ">" {
                    drop_comma(words);
                }
                words.push(word);
            }
            TokenTree::Ident(_) | TokenTree::Literal(_) => words.push(token.to_string()),
        }
    }
}

fn is_operator(word: &str) -> bool {
    OPERATORS.contains(&word)
}

fn drop_comma(words: &mut Vec<String>) {
    if words.last().is_some_and(|word| word == ",") {
        words.pop();
    }
}

/// Counts the commas in `words` that are in no brackets.
fn commas(words: &[String]) -> usize {
    let mut depth = 0_usize;
    let mut count = 0;
    for word in words {
        match word.as_str() {
            "(" | "[" | "{" | "<" => depth += 1,
            ")" | "]" | "}" | ">" => depth = depth.saturating_sub(1),
            "," if depth == 0 => count += 1,
            _ => {}
        }
    }
    count
}

/// Returns whether `word` is a name, rather than a keyword or a sign.
fn is_name(word: &str) -> bool {
    word.starts_with(|first: char| first.is_alphanumeric() || first == '_')
        && !KEYWORDS.contains(&word)
}

/// Returns whether a parenthesis after `word` belongs to it, as the arguments of a function do.
fn is_called(word: &str) -> bool {
    is_name(word) || word == ">" || word == "pub"
}

/// Returns whether there is a space between two words.
fn is_apart(before: &str, after: &str) -> bool {
    match (before, after) {
        (_, "," | ";" | "." | ")" | "]" | ">" | ":") => false,
        ("{", "}") => false,
        (",", _) => true,
        (_, "{" | "}") | ("{", _) => true,
        ("(" | "[" | "<" | "." | "?" | "!" | "&" | "*" | "#" | "$" | "::", _) => false,
        (_, "::") => !(is_name(before) || before == ">"),
        (_, "<") => !(is_name(before) || matches!(before, "for" | "impl" | "fn")),
        (_, "(") => !is_called(before),
        (_, "!") => !is_name(before),
        (_, "..." | "..=" | "..") | ("..." | "..=" | "..", _) => false,
        _ => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn prints(source: &str, expected: &str) {
        let tokens: TokenStream = source.parse().unwrap();
        assert_eq!(text(tokens), expected);
    }

    #[test]
    fn signatures_are_spaced_as_rustfmt_does() {
        for line in [
            "fn f<'a, T: ?Sized + 'a>(&'a mut self, x: &[u8], y: *const T) -> Result<(), E>",
            "fn f(self: Box<Self>, x: impl Fn(u8, &str) -> bool + Send + 'static) -> !",
            "for<'a> <T as Iterator>::Item: Into<Vec<Option<&'a dyn Any>>>",
            "impl<T> Trait<u8> for [T; 4]",
            "Option<Box<dyn FnOnce(&mut (A, B)) -> [u64; N] + Send>>",
            "#[cfg(any(test, feature = \"x\"))]",
            "impl Iterator for X { type Item = ::std::io::Result<u8>; }",
            "unsafe extern \"C\" fn(i32, ...) -> i32",
            "(Vec<A, B>,)",
        ] {
            prints(line, line);
        }
    }

    #[test]
    fn how_lines_are_broken_makes_no_difference() {
        prints(
            "fn f(\n    a: HashMap<\n        u8,\n        u16,\n    >,\n) -> (\n    u8,\n    u16,\n)",
            "fn f(a: HashMap<u8, u16>) -> (u8, u16)",
        );
        prints("fn f(x: (u8,), y: [u8; 2],)", "fn f(x: (u8,), y: [u8; 2])");
    }
}
