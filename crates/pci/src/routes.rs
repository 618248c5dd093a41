//! Which BAR answers at an address.

use crate::AddressSpace;
use crate::registers::BAR_COUNT;
use crate::window::Window;

/// Where each BAR of a function answers, by the number of its register.
pub(crate) type Places = [Option<u64>; BAR_COUNT];

/// A BAR that a function decodes at an address, whether or not the bus gets there.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Decoded {
    pub(crate) function: usize,
    pub(crate) bar: usize,
    pub(crate) space: AddressSpace,
    pub(crate) first: u64,
    pub(crate) size: u64,
}

#[derive(Clone, Copy, Debug)]
struct Route {
    first: u64,
    last: u64,
    function: usize,
    bar: usize,
}

/// A BAR and an offset into it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Target {
    pub(crate) function: usize,
    pub(crate) bar: usize,
    pub(crate) offset: u64,
}

/// The BARs that can be reached, in both address spaces: sorted, without overlap. It is made anew
/// whenever one of them moves.
#[derive(Default)]
pub(crate) struct Routes {
    memory: Vec<Route>,
    io: Vec<Route>,
}

impl Routes {
    /// Makes the routes to those BARs that lie wholly in a window. Where BARs overlap, the first
    /// one in the order of `decoded` has the place, and the others answer nowhere.
    pub(crate) fn new(windows: &[Window], decoded: impl Iterator<Item = Decoded>) -> Self {
        let mut routes = Self::default();
        for bar in decoded {
            let Some(last) = bar.first.checked_add(bar.size - 1) else {
                continue;
            };
            let reachable = |window: &Window| window.contains(bar.space, bar.first, last);
            if windows.iter().any(reachable) {
                routes.insert(bar, last);
            }
        }
        routes
    }

    fn insert(&mut self, bar: Decoded, last: u64) {
        let space = match bar.space {
            AddressSpace::Memory => &mut self.memory,
            AddressSpace::Io => &mut self.io,
        };
        let at = space.partition_point(|route| route.last < bar.first);
        if space.get(at).is_none_or(|next| last < next.first) {
            let route = Route {
                first: bar.first,
                last,
                function: bar.function,
                bar: bar.bar,
            };
            space.insert(at, route);
        }
    }

    /// The BAR that has all of the `len` addresses from `address` on.
    pub(crate) fn find(&self, space: AddressSpace, address: u64, len: usize) -> Option<Target> {
        let space = match space {
            AddressSpace::Memory => &self.memory,
            AddressSpace::Io => &self.io,
        };
        let at = space.partition_point(|route| route.last < address);
        let route = space.get(at)?;
        let last = address.checked_add((len as u64).checked_sub(1)?)?;
        (route.first <= address && last <= route.last).then(|| Target {
            function: route.function,
            bar: route.bar,
            offset: address - route.first,
        })
    }

    /// Where the BARs of each function answer.
    pub(crate) fn places(&self, functions: usize) -> Vec<Places> {
        let mut places = vec![Places::default(); functions];
        for route in self.memory.iter().chain(&self.io) {
            if let Some(place) = places
                .get_mut(route.function)
                .and_then(|bars| bars.get_mut(route.bar))
            {
                *place = Some(route.first);
            }
        }
        places
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn memory(function: usize, first: u64, size: u64) -> Decoded {
        Decoded {
            function,
            bar: 0,
            space: AddressSpace::Memory,
            first,
            size,
        }
    }

    fn routes(decoded: &[Decoded]) -> Routes {
        let windows = [
            Window::new(AddressSpace::Memory, &(0x1000..0x8000)).unwrap(),
            Window::new(AddressSpace::Io, &(0x100..0x200)).unwrap(),
        ];
        Routes::new(&windows, decoded.iter().copied())
    }

    fn function_at(routes: &Routes, address: u64) -> Option<usize> {
        let target = routes.find(AddressSpace::Memory, address, 1)?;
        Some(target.function)
    }

    #[test]
    fn an_access_reaches_the_bar_that_has_all_of_it() {
        let routes = routes(&[memory(0, 0x3000, 0x1000), memory(1, 0x2000, 0x1000)]);
        let target = |function, offset| {
            Some(Target {
                function,
                bar: 0,
                offset,
            })
        };
        let find = |address, len| routes.find(AddressSpace::Memory, address, len);
        assert_eq!(find(0x2000, 4), target(1, 0));
        assert_eq!(find(0x2ffc, 4), target(1, 0xffc));
        assert_eq!(find(0x2ffd, 4), None);
        assert_eq!(find(0x3fff, 1), target(0, 0xfff));
        assert_eq!(find(0x4000, 1), None);
        assert_eq!(find(0x1fff, 1), None);
        assert_eq!(find(0x2000, 0), None);
        assert_eq!(find(u64::MAX, 8), None);
        assert_eq!(routes.find(AddressSpace::Io, 0x2000, 1), None);
    }

    #[test]
    fn a_bar_outside_of_the_windows_answers_nowhere() {
        let routes = routes(&[
            memory(0, 0, 0x1000),
            memory(1, 0x8000, 0x1000),
            memory(2, 0x4000, 0x8000),
            memory(3, 0xffff_ffff_ffff_f000, 0x1000),
            memory(4, 0xffff_ffff_ffff_fff0, 0x1000),
        ]);
        assert_eq!(routes.places(5), vec![Places::default(); 5]);
    }

    #[test]
    fn of_overlapping_bars_the_first_one_answers() {
        let routes = routes(&[
            memory(0, 0x3000, 0x1000),
            memory(1, 0x2000, 0x2000),
            memory(2, 0x3800, 0x100),
            memory(3, 0x2000, 0x1000),
        ]);
        assert_eq!(function_at(&routes, 0x3800), Some(0));
        assert_eq!(function_at(&routes, 0x2000), Some(3));
        let places: Vec<_> = routes.places(4).into_iter().map(|bars| bars[0]).collect();
        assert_eq!(places, [Some(0x3000), None, None, Some(0x2000)]);
    }
}
