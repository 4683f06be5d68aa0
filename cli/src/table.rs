//! Columns for people.

/// Lines up `rows` under `head`: two spaces between columns, none at the end of a line.
pub fn render<const N: usize>(head: [&str; N], rows: &[[String; N]]) -> String {
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count());
        cells.chain(head.get(column).map(|cell| cell.len())).max().unwrap_or(0)
    };
    let widths: [usize; N] = std::array::from_fn(width);
    let head = head.map(str::to_owned);
    let mut text = String::new();
    for row in std::iter::once(&head).chain(rows) {
        let cells: Vec<String> =
            row.iter().zip(widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
        text.push_str(cells.join("  ").trim_end());
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    #[test]
    fn columns_line_up() {
        let rows = [["a".into(), "10 MiB".into()], ["long-name".into(), "-".into()]];
        let text = super::render(["NAME", "SIZE"], &rows);
        assert_eq!(text, "NAME       SIZE\na          10 MiB\nlong-name  -\n");
    }
}
