//! Aligned columns, two spaces apart. Widths are counted in characters; all our texts are narrow ones.

/// Which edge of its column a cell touches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Align {
    /// Texts.
    Left,
    /// Numbers.
    Right,
}

/// Rows under one line of headings.
#[derive(Debug)]
pub struct Table<const N: usize> {
    columns: [(&'static str, Align); N],
    rows: Vec<[String; N]>,
    indent: &'static str,
}

impl<const N: usize> Table<N> {
    /// An empty table.
    pub fn new(columns: [(&'static str, Align); N]) -> Self {
        Self { columns, rows: Vec::new(), indent: "" }
    }

    /// Every line begins with this.
    pub fn indented(mut self, indent: &'static str) -> Self {
        self.indent = indent;
        self
    }

    /// Adds a row below.
    pub fn row(&mut self, cells: [String; N]) {
        self.rows.push(cells);
    }

    /// The text, or `empty` when there are no rows.
    pub fn render(&self, empty: &str) -> String {
        if self.rows.is_empty() {
            return format!("{}{empty}\n", self.indent);
        }
        let headings = self.columns.map(|(heading, _)| heading.to_owned());
        let lines = || std::iter::once(&headings).chain(&self.rows);
        let width = |column: usize| lines().map(|cells| cells[column].chars().count()).max().unwrap_or(0);
        let widths: [usize; N] = std::array::from_fn(width);
        let mut text = String::new();
        for cells in lines() {
            let aligned = cells.iter().zip(widths).zip(self.columns).map(|((cell, width), (_, align))| match align {
                Align::Left => format!("{cell:<width$}"),
                Align::Right => format!("{cell:>width$}"),
            });
            let line = aligned.collect::<Vec<_>>().join("  ");
            text.push_str(format!("{}{line}", self.indent).trim_end());
            text.push('\n');
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up() {
        let mut table = Table::new([("NAME", Align::Left), ("SIZE", Align::Right), ("NOTE", Align::Left)]);
        table.row(["a".into(), "1.00 GiB".into(), String::new()]);
        table.row(["longer".into(), "5 B".into(), "x".into()]);
        assert_eq!(
            table.render("none"),
            "NAME        SIZE  NOTE\n\
             a       1.00 GiB\n\
             longer       5 B  x\n"
        );
    }

    #[test]
    fn no_rows_are_said_in_words() {
        assert_eq!(Table::new([("NAME", Align::Left)]).indented("  ").render("no sites"), "  no sites\n");
    }
}
