//! Helpers for the `.sql` files, which are stored beside the modules that use them. In these files, `{s}` is the schema
//! of our tables.

/// Returns the content of a file without the newline at its end. The database stores the text of a function or trigger
/// exactly as it was sent, and this program compares the stored text with the file byte by byte.
pub(crate) const fn without_newline(file: &str) -> &str {
    match file.as_bytes() {
        [text @ .., b'\n'] => file.split_at(text.len()).0,
        _ => file,
    }
}

/// Returns the string between the `$body$` quotes in a statement that creates a function, as the catalog stores it.
pub(crate) fn body(statement: &str) -> &str {
    statement.split(BODY).nth(1).unwrap_or_default()
}

/// The quotes around the body of a function.
pub(crate) const BODY: &str = "$body$";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn body_of_a_function_includes_the_newlines_next_to_its_quotes() {
        assert_eq!(body("CREATE FUNCTION f() AS $body$\nBEGIN\nEND\n$body$;\n"), "\nBEGIN\nEND\n");
    }

    #[test]
    fn one_newline_at_the_end_of_a_file_is_removed() {
        for (file, want) in [("", ""), ("\n", ""), ("END", "END"), ("END\n", "END"), ("\nEND\n\n", "\nEND\n")] {
            assert_eq!(without_newline(file), want);
        }
    }
}
