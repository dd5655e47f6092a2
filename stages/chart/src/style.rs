//! Colours and strokes, as rules for classes. The palette is Okabe and Ito's, by which people with any sight of colours tell
//! series apart; darkened on white and lightened on black until lines stand out enough.

/// Series that are told apart by colour; further ones begin again, with another dash and mark.
pub(crate) const COLOURS: usize = 8;

/// Steps of a heat map.
pub(crate) const STEPS: usize = 7;

struct Palette {
    surface: &'static str,
    ink: &'static str,
    quiet: &'static str,
    grid: &'static str,
    link: &'static str,
    good: &'static str,
    bad: &'static str,
    series: [&'static str; COLOURS],
    heat: [&'static str; STEPS],
}

const LIGHT: Palette = Palette {
    surface: "#ffffff",
    ink: "#1a1c1f",
    quiet: "#575c63",
    grid: "#dfe2e6",
    link: "#0059b3",
    good: "#00694b",
    bad: "#a62b00",
    series: ["#0072b2", "#c65102", "#00805a", "#a8518a", "#8a6d00", "#2b7fae", "#575c63", "#7a4fbf"],
    heat: ["#f5f8fb", "#e2ecf5", "#cbddee", "#b2cde5", "#98bcdb", "#7dabd1", "#669bc7"],
};

const DARK: Palette = Palette {
    surface: "#15171a",
    ink: "#eceef0",
    quiet: "#a9b0b8",
    grid: "#363b42",
    link: "#7cb8f2",
    good: "#5fcfa6",
    bad: "#ff9a76",
    series: ["#56b4e9", "#e69f00", "#2fc79a", "#e29cc6", "#f0e442", "#8fc7f5", "#b8bec6", "#b99cf0"],
    heat: ["#1b2026", "#1c2a37", "#1d3548", "#1e405a", "#204c6d", "#225880", "#256494"],
};

impl Palette {
    fn variables(&self) -> String {
        let mut rules = format!(
            "--surface:{};--ink:{};--quiet:{};--grid:{};--link:{};--good:{};--bad:{};",
            self.surface, self.ink, self.quiet, self.grid, self.link, self.good, self.bad
        );
        for (index, colour) in self.series.iter().enumerate() {
            rules += &format!("--c{index}:{colour};");
        }
        for (index, colour) in self.heat.iter().enumerate() {
            rules += &format!("--h{index}:{colour};");
        }
        rules
    }
}

/// The dash of a series.
const DASHES: [&str; COLOURS] = ["none", "7 3", "2 2.5", "9 3 2 3", "5 2", "1 3", "12 3", "4 2 1 2"];

/// The rules that every figure of a page needs, once. It makes these colours known as variables: `--surface`, `--ink`, `--quiet`,
/// `--grid`, `--link`, `--good`, `--bad`, `--c0` to `--c7`.
pub fn style() -> String {
    let mut rules = format!(
        ":root{{color-scheme:light dark;{light}}}\
         @media (prefers-color-scheme:dark){{:root{{{dark}}}}}\
         @media print{{:root{{color-scheme:light;{light}}}}}",
        light = LIGHT.variables(),
        dark = DARK.variables()
    );
    rules += ".chart{margin:0}\
        .chart svg{max-width:100%;height:auto}\
        .chart .wide{overflow-x:auto}\
        .chart .wide svg{max-width:none}\
        .chart text{fill:var(--ink);font:11px system-ui,'DejaVu Sans',sans-serif;font-variant-numeric:tabular-nums}\
        .chart .name{font-weight:600;font-size:12px}\
        .chart .quiet{fill:var(--quiet)}\
        .chart .small{font-size:10px}\
        .chart .end{text-anchor:end}\
        .chart .middle{text-anchor:middle}\
        .chart .paper{fill:var(--surface)}\
        .chart .axis{stroke:var(--quiet);fill:none}\
        .chart .grid{stroke:var(--grid);fill:none}\
        .chart .mark{stroke:var(--quiet);stroke-dasharray:3 3;fill:none}\
        .chart .line{stroke:var(--own);stroke-width:1.6;fill:none;stroke-linejoin:round;vector-effect:non-scaling-stroke}\
        .chart .whisker{stroke:var(--own);stroke-width:1.6;fill:none;stroke-dasharray:none}\
        .chart .band{fill:var(--own);fill-opacity:.16}\
        .chart .bar{fill:var(--own)}\
        .chart .repeat{fill:var(--surface);stroke:var(--own);stroke-width:1.2}\
        .chart .mean{fill:var(--own);stroke:var(--surface);stroke-width:.8}\
        .chart .box{fill:var(--surface);stroke:var(--quiet)}\
        .chart .group{fill:var(--grid);fill-opacity:.35;stroke:var(--quiet);stroke-dasharray:none}\
        .chart .good{stroke:var(--good);stroke-width:1.8}\
        .chart .bad{stroke:var(--bad);stroke-width:2.4;stroke-dasharray:5 2}\
        .chart .faint{stroke-dasharray:2 3}\
        .chart .thick{stroke:var(--quiet);stroke-width:1.6;fill:none}\
        .chart .thin{stroke:var(--quiet);stroke-width:1;fill:none}\
        .chart .dotted{stroke:var(--c1);stroke-width:1.4;stroke-dasharray:2 3;fill:none}\
        .chart .tip{fill:var(--quiet);stroke:none}\
        .chart .dotted-tip{fill:var(--c1);stroke:none}";
    for (index, dash) in DASHES.iter().enumerate() {
        rules += &format!(".chart .s{index}{{--own:var(--c{index})}}.chart .s{index} .line{{stroke-dasharray:{dash}}}");
    }
    for index in 0..STEPS {
        rules += &format!(".chart .h{index}{{fill:var(--h{index})}}");
    }
    rules
}

/// The class of a series.
pub(crate) fn class(series: usize) -> String {
    format!("s{}", series % COLOURS)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Relative luminance, as WCAG 2 defines it.
    fn luminance(colour: &str) -> f64 {
        let part = |at: usize| {
            let value = f64::from(u8::from_str_radix(&colour[at..at + 2], 16).unwrap()) / 255.0;
            if value <= 0.04045 { value / 12.92 } else { ((value + 0.055) / 1.055).powf(2.4) }
        };
        0.2126 * part(1) + 0.7152 * part(3) + 0.0722 * part(5)
    }

    fn contrast(a: &str, b: &str) -> f64 {
        let (a, b) = (luminance(a), luminance(b));
        (a.max(b) + 0.05) / (a.min(b) + 0.05)
    }

    #[test]
    fn text_and_lines_stand_out_in_light_and_in_the_dark() {
        assert!((contrast("#000000", "#ffffff") - 21.0).abs() < 1e-9);
        assert!((contrast("#777777", "#ffffff") - 4.478).abs() < 1e-3, "as published for this grey");
        for palette in [&LIGHT, &DARK] {
            let texts = [palette.ink, palette.quiet, palette.link, palette.good, palette.bad];
            for text in texts {
                assert!(contrast(text, palette.surface) >= 4.5, "{text} on {}", palette.surface);
            }
            for line in palette.series {
                assert!(contrast(line, palette.surface) >= 3.0, "{line} on {}", palette.surface);
            }
            for step in palette.heat {
                assert!(contrast(palette.ink, step) >= 4.5, "{} on {step}", palette.ink);
            }
        }
    }

    #[test]
    fn every_class_has_a_rule() {
        let rules = style();
        for series in 0..20 {
            assert!(rules.contains(&format!(".{}{{", class(series))));
        }
    }
}
