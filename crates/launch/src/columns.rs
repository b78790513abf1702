//! Text in columns.

/// A table: columns as wide as their widest cell, two blanks between them.
#[derive(Debug, Clone, Default)]
pub struct Columns {
    right: Vec<bool>,
    rows: Vec<Vec<String>>,
}

impl Columns {
    /// A table with these headings; one that begins with `>` is that of a column whose cells stand at its right side.
    pub fn new<T: AsRef<str>>(headings: &[T]) -> Self {
        let right = headings.iter().map(|text| text.as_ref().starts_with('>')).collect();
        let row = headings.iter().map(|text| text.as_ref().trim_start_matches('>').to_owned()).collect();
        Self { right, rows: vec![row] }
    }

    /// Adds a row.
    pub fn row<T: Into<String>>(&mut self, cells: impl IntoIterator<Item = T>) {
        self.rows.push(cells.into_iter().map(Into::into).collect());
    }

    /// The table, each line behind `indent`.
    pub fn render(&self, indent: &str) -> String {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let width = |column: usize| {
            let cells = self.rows.iter().filter_map(|row| row.get(column));
            cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
        };
        let widths: Vec<usize> = (0..columns).map(width).collect();
        let mut text = String::new();
        for row in &self.rows {
            let mut line = indent.to_owned();
            for (column, cell) in row.iter().enumerate() {
                if column > 0 {
                    line += "  ";
                }
                let blanks = " ".repeat(widths[column] - cell.chars().count());
                if self.right.get(column).copied().unwrap_or(false) {
                    line += &(blanks + cell);
                } else {
                    line += &(cell.clone() + &blanks);
                }
            }
            text += line.trim_end();
            text.push('\n');
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_needed() {
        let mut table = Columns::new(&["host", ">ms"]);
        table.row(["worker-1", "0.25"]);
        table.row(["é", "12.00"]);
        table.row(["x"]);
        assert_eq!(table.render(" "), " host         ms\n worker-1   0.25\n é         12.00\n x\n");
    }
}
