//! The model of a two-dimensional page walk.
//!
//! On a TLB miss a processor with SLAT walks the guest's page tables. Each of
//! their addresses, and the address that comes out in the end, is a guest
//! physical one, and each of those needs a walk of the host's tables first
//! (AMD APM volume 2, 15.25.5; Intel SDM volume 3, 29.3.2).

use std::fmt;

use serde::{Deserialize, Serialize};

/// How much memory the last entry of a walk maps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum PageSize {
    /// 4 KiB: the walk ends at level 1.
    #[serde(rename = "4K")]
    Size4K,
    /// 2 MiB: the walk ends at level 2.
    #[serde(rename = "2M")]
    Size2M,
    /// 1 GiB: the walk ends at level 3.
    #[serde(rename = "1G")]
    Size1G,
}

impl PageSize {
    /// Every size x86-64 has.
    pub const ALL: [Self; 3] = [Self::Size4K, Self::Size2M, Self::Size1G];

    /// Level of the entry that maps a page of this size; 1 is the last.
    pub const fn leaf_level(self) -> u32 {
        match self {
            Self::Size4K => 1,
            Self::Size2M => 2,
            Self::Size1G => 3,
        }
    }

    /// Size in bytes.
    pub const fn bytes(self) -> u64 {
        1 << (12 + 9 * (self.leaf_level() - 1))
    }
}

impl fmt::Display for PageSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Size4K => "4K",
            Self::Size2M => "2M",
            Self::Size1G => "1G",
        })
    }
}

/// How deep a tree of page tables is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Depth {
    /// 48-bit addresses.
    Four,
    /// 57-bit addresses (LA57).
    Five,
}

impl Depth {
    /// Level of the root table.
    pub const fn levels(self) -> u32 {
        match self {
            Self::Four => 4,
            Self::Five => 5,
        }
    }
}

/// One dimension of a walk: how deep the tables are and where they end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Shape {
    /// Depth of the tree.
    pub depth: Depth,
    /// Page size of the leaf.
    pub page: PageSize,
}

impl Shape {
    /// Entries read to walk this tree alone.
    pub const fn entries(self) -> u32 {
        self.depth.levels() - self.page.leaf_level() + 1
    }

    /// Levels whose entries are read, from the root down.
    pub fn levels(self) -> impl DoubleEndedIterator<Item = u32> {
        (self.page.leaf_level()..=self.depth.levels()).rev()
    }
}

/// A two-dimensional walk; `None` in a dimension means that it is not there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Walk {
    /// The guest's own tables: guest virtual to guest physical. `None`: the guest runs without paging.
    pub guest: Option<Shape>,
    /// The hypervisor's tables: guest physical to system physical. `None`: native, or shadow paging,
    /// where the processor only sees tables that lead to system physical addresses.
    pub host: Option<Shape>,
}

/// An address space of the walk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Space {
    /// Guest physical: what the guest takes for memory.
    GuestPhysical,
    /// System physical: memory.
    SystemPhysical,
}

/// What a walk of the host's tables is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Purpose {
    /// To find the guest's table of this level.
    GuestTable(u32),
    /// To find the page itself.
    Page,
}

/// One memory reference.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Step {
    /// An entry of the guest's table at `level`; the entry holds a guest physical address.
    Guest {
        /// Level of the table.
        level: u32,
    },
    /// An entry of the host's table at `level`; the entry holds a system physical address.
    Host {
        /// Level of the table.
        level: u32,
        /// Whose guest physical address is being translated.
        purpose: Purpose,
    },
}

impl Step {
    /// The space of the address that the entry read in this step holds.
    pub const fn holds(self) -> Space {
        match self {
            Self::Guest { .. } => Space::GuestPhysical,
            Self::Host { .. } => Space::SystemPhysical,
        }
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Guest { level } => {
                write!(f, "guest L{level} entry: holds the guest physical address of ")?;
                f.write_str("the next table or the page")
            }
            Self::Host { level, purpose: Purpose::GuestTable(table) } => {
                write!(f, "host  L{level} entry, to find the guest's L{table} table")
            }
            Self::Host { level, purpose: Purpose::Page } => {
                write!(f, "host  L{level} entry, to find the page")
            }
        }
    }
}

/// A walk and its numbers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Account {
    /// Its shape.
    pub walk: Walk,
    /// [`Walk::references`].
    pub references: u32,
    /// [`Walk::for_tables_only`].
    pub for_tables_only: u32,
    /// [`Walk::host_references`].
    pub host_references: u32,
    /// [`Walk::steps`].
    pub steps: Vec<Step>,
}

impl Walk {
    /// The usual walk: 4 levels of 4K pages in both dimensions.
    pub const USUAL: Self = {
        let shape = Shape { depth: Depth::Four, page: PageSize::Size4K };
        Self { guest: Some(shape), host: Some(shape) }
    };

    fn guest_entries(self) -> u32 {
        self.guest.map_or(0, Shape::entries)
    }

    fn host_entries(self) -> u32 {
        self.host.map_or(0, Shape::entries)
    }

    /// Memory references on a miss of everything: `(g+1)(h+1)-1`.
    ///
    /// An upper bound: page-walk caches and a nested TLB spare most of them.
    pub fn references(self) -> u32 {
        (self.guest_entries() + 1) * (self.host_entries() + 1) - 1
    }

    /// `g*h`: the host entries read to reach the guest's tables, without the
    /// guest's own entries and without the last walk for the page. Some texts
    /// give this number (16) as the cost.
    pub fn for_tables_only(self) -> u32 {
        self.guest_entries() * self.host_entries()
    }

    /// `(g+1)*h`: every host entry, without the guest's own. Some texts give
    /// this number (20) as the cost.
    pub fn host_references(self) -> u32 {
        (self.guest_entries() + 1) * self.host_entries()
    }

    /// Every reference, in the order in which a processor without caches makes them.
    pub fn steps(self) -> Vec<Step> {
        let host = |purpose| {
            self.host.into_iter().flat_map(Shape::levels).map(move |level| Step::Host { level, purpose })
        };
        self.guest
            .into_iter()
            .flat_map(Shape::levels)
            .flat_map(|level| host(Purpose::GuestTable(level)).chain([Step::Guest { level }]))
            .chain(host(Purpose::Page))
            .collect()
    }

    /// The formula with this walk's numbers in it.
    pub fn formula(self) -> String {
        let (g, h) = (self.guest_entries(), self.host_entries());
        format!("(g+1)(h+1)-1 = ({g}+1)({h}+1)-1 = {}", self.references())
    }

    /// The drawing, the formula, and what the texts say; with `steps`, every reference in turn.
    pub fn text(self, steps: bool) -> String {
        let mut text = self.draw();
        text += &format!("\nMemory references on a miss of everything: {}\n", self.formula());
        text += "g and h are the entries read in the guest's and in the host's tables; page-walk caches and a \
                 nested TLB\nspare most of them, so this is an upper bound.\n";
        if self == Self::USUAL {
            text += &format!(
                "Texts give {} (g*h: only the walks that find the guest's tables, not the one for the page,\n\
                 and none of the guest's own entries) or {} ((g+1)*h: every host entry, but not the guest's {}).\n\
                 {} is the whole.\n",
                self.for_tables_only(),
                self.host_references(),
                self.guest_entries(),
                self.references()
            );
        }
        if steps {
            text += "\n";
            for (number, step) in (1..).zip(self.steps()) {
                text += &format!("{number:>3}  {step}\n");
            }
        }
        text
    }

    /// Everything about the walk, for JSON.
    pub fn account(self) -> Account {
        Account {
            walk: self,
            references: self.references(),
            for_tables_only: self.for_tables_only(),
            host_references: self.host_references(),
            steps: self.steps(),
        }
    }

    /// The walk as a grid: a row for each guest physical address, a column for
    /// each level of the host's tables, the reference's number in each cell.
    pub fn draw(self) -> String {
        let mut text = String::from("                        ");
        for level in self.host.into_iter().flat_map(Shape::levels) {
            text += &format!("  host L{level}");
        }
        text += "   then read at that system physical address\n";
        let mut number = 0;
        let mut row = |name: String, entry: Option<u32>| {
            let mut line = format!("{name:<24}");
            for _ in 0..self.host_entries() {
                number += 1;
                line += &format!("{number:>5} ->");
            }
            match entry {
                Some(level) => {
                    number += 1;
                    line += &format!("{number:>5}   guest L{level} entry");
                }
                None => line += "        the page",
            }
            line + "\n"
        };
        let mut address = String::from("guest CR3");
        for level in self.guest.into_iter().flat_map(Shape::levels) {
            text += &row(format!("{address} (GPA)"), Some(level));
            address = format!("guest L{level} entry");
        }
        if self.guest.is_none() {
            address = String::from("the address itself");
        }
        text + &row(format!("{address} (GPA)"), None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn walk(guest: (Depth, PageSize), host: (Depth, PageSize)) -> Walk {
        let shape = |(depth, page)| Some(Shape { depth, page });
        Walk { guest: shape(guest), host: shape(host) }
    }

    #[test]
    fn the_numbers_of_the_texts() {
        use Depth::*;
        use PageSize::*;
        assert_eq!(Walk::USUAL.references(), 24);
        assert_eq!(Walk::USUAL.for_tables_only(), 16);
        assert_eq!(Walk::USUAL.host_references(), 20);
        for (guest, host, references) in [
            ((Four, Size4K), (Four, Size2M), 19),
            ((Four, Size2M), (Four, Size4K), 19),
            ((Four, Size2M), (Four, Size2M), 15),
            ((Four, Size1G), (Four, Size1G), 8),
            ((Five, Size4K), (Five, Size4K), 35),
        ] {
            assert_eq!(walk(guest, host).references(), references, "{guest:?} {host:?}");
        }
        let native = Walk { host: None, ..Walk::USUAL };
        assert_eq!(native.references(), 4);
        assert_eq!(Walk { guest: None, ..Walk::USUAL }.references(), 4);
        assert_eq!(Walk { guest: None, host: None }.references(), 0);
    }

    #[test]
    fn the_first_and_last_references_of_the_usual_walk() {
        let steps = Walk::USUAL.steps();
        assert_eq!(steps[0], Step::Host { level: 4, purpose: Purpose::GuestTable(4) });
        assert_eq!(steps[4], Step::Guest { level: 4 });
        assert_eq!(steps[19], Step::Guest { level: 1 });
        assert_eq!(steps[23], Step::Host { level: 1, purpose: Purpose::Page });
    }

    #[test]
    fn drawing_numbers_every_reference() {
        let drawing = Walk::USUAL.draw();
        assert_eq!(drawing.lines().count(), 6);
        for number in 1..=24 {
            let cell = format!(" {number} ");
            assert!(drawing.contains(&cell), "{number} is not in\n{drawing}");
        }
        assert!(!drawing.contains(" 25 "));
    }

    fn shapes() -> impl Strategy<Value = Option<Shape>> {
        let depth = prop_oneof![Just(Depth::Four), Just(Depth::Five)];
        let page = proptest::sample::select(&PageSize::ALL[..]);
        proptest::option::of((depth, page).prop_map(|(depth, page)| Shape { depth, page }))
    }

    proptest! {
        #[test]
        fn the_formula_counts_the_steps(guest in shapes(), host in shapes()) {
            let walk = Walk { guest, host };
            let steps = walk.steps();
            prop_assert_eq!(steps.len() as u32, walk.references());
            let hosts = steps.iter().filter(|s| s.holds() == Space::SystemPhysical).count() as u32;
            prop_assert_eq!(hosts, walk.host_references());
        }

        #[test]
        fn a_larger_page_never_costs_more(guest in shapes(), host in shapes()) {
            let bigger = |shape: Option<Shape>| shape.map(|s| Shape { page: PageSize::Size1G, ..s });
            let walk = Walk { guest, host };
            let guest_bigger = Walk { guest: bigger(guest), host };
            let host_bigger = Walk { guest, host: bigger(host) };
            prop_assert!(guest_bigger.references() <= walk.references());
            prop_assert!(host_bigger.references() <= walk.references());
        }

        #[test]
        fn every_host_walk_is_whole(guest in shapes(), host in shapes()) {
            // Between two guest entries lie exactly h host entries, levels going down.
            let walk = Walk { guest, host };
            for run in walk.steps().split(|s| s.holds() == Space::GuestPhysical) {
                let levels: Vec<u32> = run
                    .iter()
                    .map(|s| match s { Step::Host { level, .. } | Step::Guest { level } => *level })
                    .collect();
                let whole: Vec<u32> = host.into_iter().flat_map(Shape::levels).collect();
                prop_assert_eq!(levels, whole);
            }
        }
    }
}
