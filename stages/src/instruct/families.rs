//! The task families: what each asks, and every right answer to it.

use contract::random::{below, philox, purpose};

use super::world::{
    ANIMALS, Animal, CITIES, COLOURS, FOODS, HOBBIES, JOBS, NAMES, OBJECTS, OPPOSITES, PLACES, QUALITIES, TIMES, TOOLS,
    VERBS, article, plural,
};

/// A task, drawn but not yet put into words.
pub(super) struct Task {
    /// The facts it is about, the same for every wording: decides its split.
    pub(super) key: String,
    /// Ways to ask.
    pub(super) wordings: Vec<String>,
    /// Right answers.
    pub(super) answers: Vec<String>,
}

/// One kind of task.
pub(super) struct Family {
    /// Name in the rows.
    pub(super) name: &'static str,
    /// How often it is drawn, beside the other weights.
    pub(super) weight: u64,
    /// Draws one.
    pub(super) task: fn(&mut Draw) -> Task,
}

/// All families, by weight: reading comes most often, since copying from the prompt is what takes longest to learn.
pub(super) const FAMILIES: [Family; 13] = [
    Family { name: "read", weight: 3, task: read },
    Family { name: "animal", weight: 2, task: animal },
    Family { name: "describe", weight: 2, task: describe },
    Family { name: "compose", weight: 2, task: compose },
    Family { name: "note", weight: 2, task: note },
    Family { name: "past", weight: 2, task: past },
    Family { name: "combine", weight: 2, task: combine },
    Family { name: "compare", weight: 1, task: compare },
    Family { name: "opposite", weight: 1, task: opposite },
    Family { name: "gift", weight: 2, task: gift },
    Family { name: "story", weight: 2, task: story },
    Family { name: "plan", weight: 2, task: plan },
    Family { name: "listing", weight: 2, task: listing },
];

/// The random choices of one row: a function of the seed, the row and how many choices came before.
pub(super) struct Draw {
    seed: u64,
    row: u32,
    position: u32,
}

impl Draw {
    pub(super) fn new(seed: u64, row: u32) -> Self {
        Draw { seed, row, position: 0 }
    }

    pub(super) fn below(&mut self, bound: usize) -> usize {
        let [high, low, ..] = philox(self.seed, [self.position, self.row, 0, purpose::CORPUS]);
        self.position += 1;
        below(high, low, bound as u64) as usize
    }

    pub(super) fn pick<'a, T>(&mut self, from: &'a [T]) -> &'a T {
        &from[self.below(from.len())]
    }

    /// Two different ones, in random order.
    pub(super) fn two<'a, T>(&mut self, from: &'a [T]) -> (&'a T, &'a T) {
        let first = self.below(from.len());
        let second = (first + 1 + self.below(from.len() - 1)) % from.len();
        (&from[first], &from[second])
    }

    pub(super) fn family(&mut self) -> &'static Family {
        let mut at = self.below(FAMILIES.iter().map(|f| f.weight as usize).sum()) as u64;
        for family in &FAMILIES {
            match at.checked_sub(family.weight) {
                Some(rest) => at = rest,
                None => return family,
            }
        }
        unreachable!("a number below the sum of the weights falls on a family")
    }
}

/// A task from its parts.
fn task<const W: usize, const A: usize>(key: String, wordings: [String; W], answers: [String; A]) -> Task {
    Task { key, wordings: wordings.into(), answers: answers.into() }
}

/// A noun with its article.
fn a(noun: &str) -> String {
    format!("{} {noun}", article(noun))
}

/// The same with a capital, to begin a sentence.
fn capital(text: &str) -> String {
    let mut letters = text.chars();
    letters.next().map_or_else(String::new, |first| first.to_uppercase().chain(letters).collect())
}

fn read(draw: &mut Draw) -> Task {
    let (name, job, city, hobby) = (draw.pick(&NAMES), draw.pick(&JOBS), draw.pick(&CITIES), draw.pick(&HOBBIES));
    let (job, hobby) = (job.name, hobby.name);
    let context = format!("{name} is {} from {city} who likes {hobby}.", a(job));
    let (asked, questions, answers) = match draw.below(3) {
        0 => (
            "job",
            [format!("What is the job of {name}?"), format!("What does {name} do for a living?")],
            [
                format!("{name} is {}.", a(job)),
                format!("{name} works as {}.", a(job)),
                format!("The job of {name} is {job}."),
            ],
        ),
        1 => (
            "city",
            [format!("Where is {name} from?"), format!("Which city does {name} come from?")],
            [
                format!("{name} is from {city}."),
                format!("{name} comes from {city}."),
                format!("The home of {name} is {city}."),
            ],
        ),
        _ => (
            "hobby",
            [format!("What does {name} like?"), format!("What is the hobby of {name}?")],
            [
                format!("{name} likes {hobby}."),
                format!("{name} enjoys {hobby}."),
                format!("The hobby of {name} is {hobby}."),
            ],
        ),
    };
    let [first, second] = questions;
    task(
        format!("{asked} {name} {job} {city} {hobby}"),
        [format!("{context} {first}"), format!("{context} {second}"), format!("Read: {context} {first}")],
        answers,
    )
}

fn animal(draw: &mut Draw) -> Task {
    let Animal { name, class, home, food } = draw.pick(&ANIMALS);
    let one = capital(&a(name));
    match draw.below(3) {
        0 => task(
            format!("class {name}"),
            [
                format!("What kind of animal is {}?", a(name)),
                format!("Name the group of the {name}."),
                format!("To which group does the {name} belong?"),
            ],
            [
                format!("{one} is {}.", a(class)),
                format!("The {name} belongs to the {}.", plural(class)),
                format!("The {name} is a kind of {class}."),
            ],
        ),
        1 => task(
            format!("home {name}"),
            [
                format!("Where does {} live?", a(name)),
                format!("Name the home of the {name}."),
                format!("Where can you find {}?", a(name)),
            ],
            [
                format!("{one} lives in the {home}."),
                format!("The home of the {name} is the {home}."),
                format!("You can find {} in the {home}.", a(name)),
            ],
        ),
        _ => task(
            format!("food {name}"),
            [
                format!("What does {} eat?", a(name)),
                format!("Name the food of the {name}."),
                format!("What do you feed {}?", a(name)),
            ],
            [
                format!("{one} eats {food}."),
                format!("The food of the {name} is {food}."),
                format!("The {name} feeds on {food}."),
            ],
        ),
    }
}

fn describe(draw: &mut Draw) -> Task {
    let (name, answers) = match draw.below(ANIMALS.len() + FOODS.len() + TOOLS.len() + JOBS.len()) {
        i if i < ANIMALS.len() => {
            let Animal { name, class, home, food } = &ANIMALS[i];
            let (one, class) = (capital(&a(name)), a(class));
            (
                *name,
                [
                    format!("{one} is {class} that lives in the {home} and eats {food}."),
                    format!("{one} is {class}. It lives in the {home} and eats {food}."),
                    format!("{one} lives in the {home}. It is {class} and eats {food}."),
                ],
            )
        }
        i if i < ANIMALS.len() + FOODS.len() => {
            let food = &FOODS[i - ANIMALS.len()];
            let (one, category, colour, taste) = (capital(&a(food.name)), food.category, food.colour, food.taste);
            (
                food.name,
                [
                    format!("{one} is {} {category} that tastes {taste}.", a(colour)),
                    format!("{one} is {}. It is {colour} and tastes {taste}.", a(category)),
                    format!("{one} is {colour} and tastes {taste}. It is {}.", a(category)),
                ],
            )
        }
        i if i < ANIMALS.len() + FOODS.len() + TOOLS.len() => {
            let tool = &TOOLS[i - ANIMALS.len() - FOODS.len()];
            let (one, purpose, place) = (capital(&a(tool.name)), tool.purpose, tool.place);
            (
                tool.name,
                [
                    format!("{one} is a tool to {purpose}. It is kept in the {place}."),
                    format!("{one} is a tool from the {place} that is used to {purpose}."),
                    format!("You use {} to {purpose}. You find it in the {place}.", a(tool.name)),
                ],
            )
        }
        i => {
            let job = &JOBS[i - ANIMALS.len() - FOODS.len() - TOOLS.len()];
            let (one, place, work) = (capital(&a(job.name)), job.place, job.work);
            (
                job.name,
                [
                    format!("{one} works in the {place} and {work}."),
                    format!("{one} is a person who {work} in the {place}."),
                    format!("{one} {work}. The work is done in the {place}."),
                ],
            )
        }
    };
    let wordings =
        [format!("Describe {}.", a(name)), format!("What is {}?", a(name)), format!("Tell me about the {name}.")];
    task(name.to_owned(), wordings, answers)
}

fn compose(draw: &mut Draw) -> Task {
    let (animal, object, place) = (draw.pick(&ANIMALS).name, draw.pick(&OBJECTS), draw.pick(&PLACES));
    task(
        format!("{animal} {object} {place}"),
        [
            format!("Write a sentence with the words {animal}, {object} and {place}."),
            format!("Use {animal}, {object} and {place} in a sentence."),
            format!("Make a sentence from these words: {animal}, {object}, {place}."),
        ],
        [
            format!("The {animal} found {} near the {place} and took it home.", a(object)),
            format!("Yesterday I saw {} with {} at the {place}.", a(animal), a(object)),
            format!("There is {} and {} in front of the old {place}.", a(animal), a(object)),
            format!("The {animal} took the {object} to the {place} and left it there."),
        ],
    )
}

fn note(draw: &mut Draw) -> Task {
    let ((from, to), thing) = (draw.two(&NAMES), draw.pick(&OBJECTS));
    task(
        format!("{from} {to} {thing}"),
        [
            format!("Write a thank-you note from {from} to {to} for the {thing}."),
            format!("{to} gave {from} {}. Write a thank-you note.", a(thing)),
            format!("Thank {to} for the {thing} in a note from {from}."),
        ],
        [
            format!("Dear {to},\nthank you very much for the {thing}. I use it every day.\nYours, {from}"),
            format!("Hello {to},\nI love the {thing} you gave me. It was very kind of you.\nBest wishes, {from}"),
            format!("Dear {to},\nmany thanks for the lovely {thing}. Please visit me soon.\nLove, {from}"),
        ],
    )
}

fn past(draw: &mut Draw) -> Task {
    let (name, verb, object, time) = (draw.pick(&NAMES), draw.pick(&VERBS), draw.pick(&OBJECTS), draw.pick(&TIMES));
    let (present, past) = (verb.present, verb.past);
    let sentence = format!("{name} {present} the {object} {time}.");
    task(
        format!("{name} {present} {object} {time}"),
        [
            format!("Put this sentence into the past: {sentence}"),
            format!("Write in the past: {sentence}"),
            format!("Say that it is over: {sentence}"),
        ],
        [format!("{name} {past} the {object} {time}."), format!("{}, {name} {past} the {object}.", capital(time))],
    )
}

fn combine(draw: &mut Draw) -> Task {
    let (name, city, quality) = (draw.pick(&NAMES), draw.pick(&CITIES), draw.pick(&QUALITIES));
    let (job, hobby) = (draw.pick(&JOBS).name, draw.pick(&HOBBIES).name);
    let (key, statements, answers) = match draw.below(3) {
        0 => (
            format!("{name} {job} {city}"),
            format!("{name} is {}. {name} lives in {city}.", a(job)),
            [
                format!("{name} is {} who lives in {city}.", a(job)),
                format!("{name} is {} and lives in {city}.", a(job)),
                format!("{name}, {}, lives in {city}.", a(job)),
            ],
        ),
        1 => (
            format!("{name} {quality} {hobby}"),
            format!("{name} is {quality}. {name} likes {hobby}."),
            [
                format!("{name} is {quality} and likes {hobby}."),
                format!("{name}, who is {quality}, likes {hobby}."),
                format!("{name} likes {hobby} and is {quality}."),
            ],
        ),
        _ => (
            format!("{name} {job} {city} {hobby}"),
            format!("{name} is {}. {name} lives in {city}. {name} likes {hobby}.", a(job)),
            [
                format!("{name} is {} who lives in {city} and likes {hobby}.", a(job)),
                format!("{name}, {} in {city}, likes {hobby}.", a(job)),
                format!("{name} is {}, lives in {city} and likes {hobby}.", a(job)),
            ],
        ),
    };
    task(
        key,
        [
            format!("Combine into one sentence: {statements}"),
            format!("Join these statements: {statements}"),
            format!("{statements} Say this in one sentence."),
        ],
        answers,
    )
}

fn compare(draw: &mut Draw) -> Task {
    let first = draw.below(ANIMALS.len());
    let second = (first + 1 + draw.below(ANIMALS.len() - 1)) % ANIMALS.len();
    let (small, big) = (ANIMALS[first.min(second)].name, ANIMALS[first.max(second)].name);
    let (word, is, is_not) = if draw.below(2) == 0 { ("bigger", big, small) } else { ("smaller", small, big) };
    // The order of the question says nothing about the answer, and is no part of the key.
    let (first, second) = (ANIMALS[first].name, ANIMALS[second].name);
    task(
        format!("{word} {small} {big}"),
        [
            format!("Which animal is {word}, the {first} or the {second}?"),
            format!("Is the {first} or the {second} {word}?"),
        ],
        [
            format!("The {is} is {word}."),
            format!("The {is} is {word} than the {is_not}."),
            format!("The {word} animal is the {is}."),
        ],
    )
}

fn opposite(draw: &mut Draw) -> Task {
    let (object, pair, colour) = (draw.pick(&OBJECTS), draw.pick(&OPPOSITES), draw.pick(&COLOURS));
    let (word, other) = if draw.below(2) == 0 { *pair } else { (pair.1, pair.0) };
    let statement = format!("The {colour} {object} is {word}.");
    task(
        format!("{colour} {object} {word}"),
        [
            format!("Make this mean the opposite: {statement}"),
            format!("Say the opposite: {statement}"),
            format!("{statement} What is the opposite?"),
        ],
        [format!("The {colour} {object} is {other}."), format!("The {colour} {object} is not {word} but {other}.")],
    )
}

fn gift(draw: &mut Draw) -> Task {
    let (name, hobby) = (draw.pick(&NAMES), draw.pick(&HOBBIES));
    let (hobby, gift) = (hobby.name, hobby.gift);
    task(
        format!("{name} {hobby}"),
        [
            format!("What is a good gift for {name}, who likes {hobby}?"),
            format!("{name} likes {hobby}. Name a gift."),
            format!("Choose a gift for {name}, a friend of {hobby}."),
        ],
        [
            format!("A good gift for {name} is {gift}."),
            format!("I think that {name} would love {gift}."),
            format!("Give {name} {gift}, since {name} likes {hobby} so much."),
        ],
    )
}

fn story(draw: &mut Draw) -> Task {
    let (animal, name, thing, place) =
        (draw.pick(&ANIMALS), draw.pick(&NAMES), draw.pick(&OBJECTS), draw.pick(&PLACES));
    let (home, animal) = (animal.home, animal.name);
    task(
        format!("{animal} {name} {thing} {place}"),
        [
            format!("Write a short story about {} named {name}, a lost {thing} and the {place}.", a(animal)),
            format!("Tell a story: {name} the {animal} lost the {thing} and looks at the {place}."),
        ],
        [
            format!(
                "{name} the {animal} lived in the {home}. One day {name} lost the {thing} and was sad. At last {name} found it at the {place}."
            ),
            format!(
                "There was {} named {name} in the {home}. One day the {thing} was lost. It was at the {place}, and {name} was happy again.",
                a(animal)
            ),
            format!(
                "In the {home} lived {name} the {animal}. One morning {name} could not find the {thing}. A friend saw it at the {place} and brought it back."
            ),
        ],
    )
}

fn plan(draw: &mut Draw) -> Task {
    let (city, (first, second)) = (draw.pick(&CITIES), draw.two(&PLACES));
    task(
        format!("{city} {first} {second}"),
        [
            format!("Plan a day in {city} with the {first} and the {second}."),
            format!("I want to see the {first} and the {second} in {city}. Make a plan."),
            format!("Plan a trip to {city}: first the {first}, then the {second}."),
        ],
        [
            format!(
                "In the morning, visit the {first} of {city}. In the afternoon, go to the {second} and stay until the evening."
            ),
            format!(
                "Start your day in {city} with a walk to the {first}. After lunch, see the {second} and rest a little."
            ),
            format!("First take your time at the {first}. Then have lunch, and end the day in {city} at the {second}."),
        ],
    )
}

fn listing(draw: &mut Draw) -> Task {
    let categories = categories();
    let (asked, other) = draw.two(&categories);
    let (one, two) = draw.two(&asked.1);
    let (wrong, also_wrong) = draw.two(&other.1);
    // All ways to mix the two pairs that keep the order within each.
    let words = [wrong, also_wrong, one, two];
    let places: [[usize; 4]; 6] = [[2, 3, 0, 1], [2, 0, 3, 1], [2, 0, 1, 3], [0, 2, 3, 1], [0, 2, 1, 3], [0, 1, 2, 3]];
    let [w0, w1, w2, w3] = draw.pick(&places).map(|i| words[i]);
    let mut sorted = [one, two, wrong, also_wrong];
    sorted[..2].sort_unstable();
    sorted[2..].sort_unstable();
    let group = &asked.0;
    task(
        format!("{group} {}", sorted.map(|w| *w).join(" ")),
        [
            format!("Which two of these are {group}: {w0}, {w1}, {w2}, {w3}?"),
            format!("Pick the {group} from {w0}, {w1}, {w2} and {w3}."),
            format!("{}, {w1}, {w2}, {w3}. Name the {group}.", capital(w0)),
        ],
        [
            format!("The {group} are {one} and {two}."),
            format!("{} and {two} are {group}.", capital(one)),
            format!("They are {one} and {two}."),
        ],
    )
}

/// Groups of words that a listing asks for; no word is in two.
fn categories() -> Vec<(String, Vec<&'static str>)> {
    let animals = ["mammal", "bird", "fish", "reptile", "insect"]
        .map(|class| (plural(class), ANIMALS.iter().filter(|a| a.class == class).map(|a| a.name).collect::<Vec<_>>()));
    let foods = ["fruit", "vegetable", "dessert", "spice"].map(|category| {
        (plural(category), FOODS.iter().filter(|f| f.category == category).map(|f| f.name).collect::<Vec<_>>())
    });
    let others = [
        ("tools".to_owned(), TOOLS.iter().map(|t| t.name).collect()),
        ("jobs".to_owned(), JOBS.iter().map(|j| j.name).collect()),
    ];
    animals.into_iter().chain(foods).chain(others).collect()
}

#[cfg(test)]
mod tests {
    use std::collections::{HashMap, HashSet};

    use super::*;

    /// Many draws of one family.
    fn draws(name: &str, count: u32) -> Vec<Task> {
        let family = FAMILIES.iter().find(|f| f.name == name).unwrap();
        (0..count).map(|row| (family.task)(&mut Draw::new(5, row))).collect()
    }

    #[test]
    fn families_come_by_their_weights() {
        let mut counts = HashMap::new();
        for row in 0..26_000 {
            *counts.entry(Draw::new(1, row).family().name).or_insert(0) += 1;
        }
        for Family { name, weight, .. } in &FAMILIES {
            let expected = 26_000 / 25 * *weight as i32;
            assert!((counts[name] - expected).abs() < expected / 8, "{name}: {} of {expected}", counts[name]);
        }
    }

    #[test]
    fn every_answer_is_a_clean_and_different_sentence() {
        for Family { name, .. } in &FAMILIES {
            for task in draws(name, 300) {
                let texts = task.wordings.iter().chain(&task.answers);
                for text in texts {
                    assert!(text.starts_with(|c: char| c.is_uppercase()), "{name}: {text}");
                    assert!(!text.contains("  ") && text.trim() == text && !text.contains(".."), "{name}: {text}");
                }
                assert_eq!(task.answers.iter().collect::<HashSet<_>>().len(), task.answers.len(), "{name}");
                assert!((2..=3).contains(&task.wordings.len()) && (2..=4).contains(&task.answers.len()), "{name}");
            }
        }
    }

    #[test]
    fn a_key_has_one_set_of_answers() {
        for Family { name, .. } in FAMILIES.iter().filter(|f| f.name != "listing") {
            let mut seen: HashMap<String, Vec<String>> = HashMap::new();
            for task in draws(name, 2000) {
                let answers = seen.entry(task.key.clone()).or_insert_with(|| task.answers.clone());
                assert_eq!(answers, &task.answers, "{name}: {}", task.key);
            }
        }
    }

    #[test]
    fn a_listing_names_the_members_in_the_order_of_the_question() {
        for task in draws("listing", 500) {
            let (question, answer) = (task.wordings[1].to_lowercase(), &task.answers[2]);
            let (one, two) = answer["They are ".len()..answer.len() - 1].split_once(" and ").unwrap();
            let at = |word: &str| question.find(&format!(" {word}")).unwrap();
            assert!(at(one) < at(two), "{question} {answer}");
        }
    }

    #[test]
    fn no_word_is_in_two_categories() {
        let all = categories();
        let words: Vec<&str> = all.iter().flat_map(|(_, words)| words.clone()).collect();
        assert_eq!(words.iter().collect::<HashSet<_>>().len(), words.len());
        assert!(all.iter().all(|(_, words)| words.len() >= 2));
    }

    #[test]
    fn comparisons_follow_the_order_of_the_table() {
        for task in draws("compare", 300) {
            let longer = &task.answers[1];
            let place = |word: &str| ANIMALS.iter().position(|a| a.name == word).unwrap();
            let (is, is_not) = longer[4..longer.len() - 1].split_once(" than the ").unwrap();
            let (is, word) = is.split_once(" is ").unwrap();
            assert_eq!(place(is) > place(is_not), word == "bigger", "{longer}");
        }
    }
}
