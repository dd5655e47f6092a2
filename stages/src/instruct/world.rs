//! The small world that the built-in corpus speaks of: tables of facts and words, all written for it.

/// An animal. The table is in order of size, the smallest first.
pub(super) struct Animal {
    /// Singular.
    pub name: &'static str,
    /// Kind of animal, singular.
    pub class: &'static str,
    /// Where it lives, after "in the".
    pub home: &'static str,
    /// What it eats.
    pub food: &'static str,
}

/// A food.
pub(super) struct Food {
    /// Singular.
    pub name: &'static str,
    /// Kind of food, singular.
    pub category: &'static str,
    /// A colour.
    pub colour: &'static str,
    /// A taste.
    pub taste: &'static str,
}

/// A tool.
pub(super) struct Tool {
    /// Singular.
    pub name: &'static str,
    /// What it does, after "to".
    pub purpose: &'static str,
    /// Where it is kept, after "in the".
    pub place: &'static str,
}

/// A job.
pub struct Job {
    /// Singular.
    pub name: &'static str,
    /// Where it is done, after "in the".
    pub place: &'static str,
    /// What one does, third person.
    pub work: &'static str,
}

/// A verb with an object.
pub(super) struct Verb {
    /// Third person, present.
    pub present: &'static str,
    /// Past.
    pub past: &'static str,
}

/// A hobby and the present that fits it.
pub(super) struct Hobby {
    /// After "likes".
    pub name: &'static str,
    /// With its article.
    pub gift: &'static str,
}

const fn animal(name: &'static str, class: &'static str, home: &'static str, food: &'static str) -> Animal {
    Animal { name, class, home, food }
}

const fn food(name: &'static str, category: &'static str, colour: &'static str, taste: &'static str) -> Food {
    Food { name, category, colour, taste }
}

const fn tool(name: &'static str, purpose: &'static str, place: &'static str) -> Tool {
    Tool { name, purpose, place }
}

const fn job(name: &'static str, place: &'static str, work: &'static str) -> Job {
    Job { name, place, work }
}

const fn verb(present: &'static str, past: &'static str) -> Verb {
    Verb { present, past }
}

const fn hobby(name: &'static str, gift: &'static str) -> Hobby {
    Hobby { name, gift }
}

/// Animals, the smallest first.
pub(super) const ANIMALS: [Animal; 35] = [
    animal("flea", "insect", "fur", "blood"),
    animal("ant", "insect", "soil", "seeds"),
    animal("fly", "insect", "house", "sugar"),
    animal("bee", "insect", "hive", "nectar"),
    animal("beetle", "insect", "soil", "leaves"),
    animal("butterfly", "insect", "garden", "nectar"),
    animal("goldfish", "fish", "pond", "flakes"),
    animal("mouse", "mammal", "house", "cheese"),
    animal("lizard", "reptile", "desert", "insects"),
    animal("sparrow", "bird", "garden", "seeds"),
    animal("bat", "mammal", "cave", "insects"),
    animal("trout", "fish", "river", "insects"),
    animal("squirrel", "mammal", "forest", "nuts"),
    animal("owl", "bird", "forest", "mice"),
    animal("duck", "bird", "pond", "weeds"),
    animal("rabbit", "mammal", "field", "grass"),
    animal("hen", "bird", "farm", "grain"),
    animal("salmon", "fish", "river", "shrimp"),
    animal("cat", "mammal", "house", "fish"),
    animal("fox", "mammal", "forest", "rabbits"),
    animal("eagle", "bird", "mountains", "snakes"),
    animal("penguin", "bird", "ice", "fish"),
    animal("snake", "reptile", "desert", "mice"),
    animal("goat", "mammal", "mountains", "leaves"),
    animal("wolf", "mammal", "forest", "meat"),
    animal("sheep", "mammal", "field", "grass"),
    animal("lion", "mammal", "plains", "meat"),
    animal("ostrich", "bird", "plains", "seeds"),
    animal("bear", "mammal", "mountains", "honey"),
    animal("horse", "mammal", "farm", "hay"),
    animal("camel", "mammal", "desert", "shrubs"),
    animal("crocodile", "reptile", "swamp", "fish"),
    animal("shark", "fish", "sea", "fish"),
    animal("elephant", "mammal", "plains", "leaves"),
    animal("whale", "mammal", "sea", "shrimp"),
];

/// Foods.
pub(super) const FOODS: [Food; 20] = [
    food("apple", "fruit", "red", "sweet"),
    food("lemon", "fruit", "yellow", "sour"),
    food("banana", "fruit", "yellow", "sweet"),
    food("cherry", "fruit", "red", "sweet"),
    food("plum", "fruit", "purple", "sweet"),
    food("lime", "fruit", "green", "sour"),
    food("grape", "fruit", "purple", "sweet"),
    food("carrot", "vegetable", "orange", "sweet"),
    food("onion", "vegetable", "white", "sharp"),
    food("radish", "vegetable", "red", "sharp"),
    food("cabbage", "vegetable", "green", "mild"),
    food("potato", "vegetable", "brown", "mild"),
    food("olive", "vegetable", "green", "salty"),
    food("pumpkin", "vegetable", "orange", "mild"),
    food("cake", "dessert", "brown", "sweet"),
    food("pudding", "dessert", "white", "sweet"),
    food("cookie", "dessert", "brown", "sweet"),
    food("pepper", "spice", "black", "hot"),
    food("chilli", "spice", "red", "hot"),
    food("saffron", "spice", "yellow", "bitter"),
];

/// Tools.
pub(super) const TOOLS: [Tool; 20] = [
    tool("hammer", "drive nails", "workshop"),
    tool("saw", "cut wood", "workshop"),
    tool("drill", "make holes", "workshop"),
    tool("file", "smooth metal", "workshop"),
    tool("spade", "dig holes", "shed"),
    tool("rake", "gather leaves", "shed"),
    tool("hose", "water plants", "shed"),
    tool("axe", "split logs", "shed"),
    tool("knife", "slice bread", "kitchen"),
    tool("pan", "fry eggs", "kitchen"),
    tool("oven", "bake cakes", "kitchen"),
    tool("spoon", "stir soup", "kitchen"),
    tool("needle", "sew clothes", "drawer"),
    tool("ruler", "draw lines", "drawer"),
    tool("brush", "paint walls", "cupboard"),
    tool("broom", "sweep floors", "cupboard"),
    tool("mop", "wipe floors", "cupboard"),
    tool("iron", "press shirts", "cupboard"),
    tool("jack", "lift cars", "garage"),
    tool("pump", "fill tyres", "garage"),
];

/// Jobs.
pub const JOBS: [Job; 20] = [
    job("nurse", "hospital", "cares for the sick"),
    job("doctor", "hospital", "treats the sick"),
    job("teacher", "school", "teaches children"),
    job("baker", "bakery", "bakes bread"),
    job("cook", "kitchen", "makes meals"),
    job("farmer", "fields", "grows crops"),
    job("gardener", "garden", "plants flowers"),
    job("pilot", "airport", "flies planes"),
    job("sailor", "harbour", "steers ships"),
    job("driver", "street", "drives buses"),
    job("judge", "court", "decides cases"),
    job("lawyer", "court", "defends people"),
    job("writer", "study", "writes books"),
    job("painter", "studio", "paints pictures"),
    job("singer", "theatre", "sings songs"),
    job("actor", "theatre", "plays roles"),
    job("builder", "street", "builds houses"),
    job("miner", "mine", "digs coal"),
    job("tailor", "shop", "sews suits"),
    job("clerk", "office", "files papers"),
];

/// First names.
pub(super) const NAMES: [&str; 40] = [
    "Adam", "Alice", "Anna", "Ben", "Bella", "Carl", "Clara", "Dan", "Diana", "Emma", "Eric", "Eva", "Felix", "Fiona",
    "Frank", "Grace", "Hanna", "Henry", "Ivan", "Jack", "Jane", "Karl", "Kate", "Laura", "Leo", "Lucy", "Maria",
    "Mark", "Nina", "Nora", "Oscar", "Paul", "Peter", "Rosa", "Sam", "Sara", "Tom", "Vera", "Will", "Zoe",
];

/// Cities.
pub(super) const CITIES: [&str; 20] = [
    "Athens", "Berlin", "Boston", "Cairo", "Delhi", "Dublin", "Geneva", "Lima", "Lisbon", "London", "Madrid", "Milan",
    "Moscow", "Oslo", "Paris", "Prague", "Rome", "Sydney", "Tokyo", "Vienna",
];

/// Hobbies and the present that fits each.
pub(super) const HOBBIES: [Hobby; 12] = [
    hobby("chess", "a chess board"),
    hobby("reading", "a novel"),
    hobby("painting", "a set of colours"),
    hobby("fishing", "a fishing rod"),
    hobby("cooking", "a cookbook"),
    hobby("cycling", "a helmet"),
    hobby("hiking", "a backpack"),
    hobby("swimming", "a pair of goggles"),
    hobby("gardening", "a packet of seeds"),
    hobby("music", "a guitar"),
    hobby("skating", "a pair of skates"),
    hobby("sailing", "a compass"),
];

/// Things that one owns, loses or gives away.
pub(super) const OBJECTS: [&str; 18] = [
    "ball", "basket", "book", "bottle", "box", "coat", "cup", "hat", "key", "kite", "lamp", "map", "mirror", "ring",
    "scarf", "umbrella", "vase", "watch",
];

/// Places in a city.
pub(super) const PLACES: [&str; 10] =
    ["bridge", "castle", "church", "library", "lake", "market", "museum", "park", "station", "tower"];

/// Colours.
pub(super) const COLOURS: [&str; 8] = ["red", "blue", "green", "yellow", "black", "white", "brown", "orange"];

/// Qualities of a person.
pub(super) const QUALITIES: [&str; 10] =
    ["brave", "calm", "clever", "friendly", "funny", "honest", "kind", "patient", "polite", "quiet"];

/// Words with their opposites; each stands for the other.
pub(super) const OPPOSITES: [(&str, &str); 16] = [
    ("big", "small"),
    ("old", "new"),
    ("hot", "cold"),
    ("wet", "dry"),
    ("full", "empty"),
    ("heavy", "light"),
    ("clean", "dirty"),
    ("open", "closed"),
    ("cheap", "costly"),
    ("soft", "hard"),
    ("wide", "narrow"),
    ("bright", "dark"),
    ("strong", "weak"),
    ("thick", "thin"),
    ("rough", "smooth"),
    ("near", "far"),
];

/// Verbs.
pub(super) const VERBS: [Verb; 10] = [
    verb("breaks", "broke"),
    verb("brings", "brought"),
    verb("buys", "bought"),
    verb("draws", "drew"),
    verb("finds", "found"),
    verb("hides", "hid"),
    verb("loses", "lost"),
    verb("sees", "saw"),
    verb("sells", "sold"),
    verb("takes", "took"),
];

/// Times at which something happens.
pub(super) const TIMES: [&str; 8] = [
    "in the morning",
    "in the evening",
    "at noon",
    "at night",
    "after lunch",
    "before dinner",
    "on Sunday",
    "on Monday",
];

/// Plural of a noun of these tables.
pub(super) fn plural(noun: &str) -> String {
    match noun {
        "fish" | "goldfish" | "trout" | "salmon" | "sheep" => noun.to_owned(),
        "mouse" => "mice".to_owned(),
        "wolf" => "wolves".to_owned(),
        "knife" => "knives".to_owned(),
        "potato" => "potatoes".to_owned(),
        _ => match noun.strip_suffix('y') {
            Some(stem) if !stem.ends_with(['a', 'e', 'o', 'u']) => format!("{stem}ies"),
            _ if noun.ends_with(['s', 'x', 'h']) => format!("{noun}es"),
            _ => format!("{noun}s"),
        },
    }
}

/// `a` or `an` before a word of these tables.
pub fn article(word: &str) -> &'static str {
    if word.starts_with(['a', 'e', 'i', 'o', 'u']) { "an" } else { "a" }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn no_table_names_a_thing_twice() {
        let distinct = |names: Vec<&str>| names.iter().collect::<HashSet<_>>().len() == names.len();
        assert!(distinct(ANIMALS.iter().map(|a| a.name).collect()));
        assert!(distinct(FOODS.iter().map(|f| f.name).collect()));
        assert!(distinct(TOOLS.iter().map(|t| t.name).collect()));
        assert!(distinct(JOBS.iter().map(|j| j.name).collect()));
        assert!(distinct(NAMES.to_vec()) && distinct(CITIES.to_vec()) && distinct(OBJECTS.to_vec()));
        assert!(distinct(OPPOSITES.iter().flat_map(|(a, b)| [*a, *b]).collect()));
    }

    #[test]
    fn words_take_their_article_and_plural() {
        assert_eq!(["ant", "umbrella", "bee"].map(article), ["an", "an", "a"]);
        assert_eq!(
            ["butterfly", "fox", "radish", "ostrich", "fish", "wolf", "donkey"].map(plural),
            ["butterflies", "foxes", "radishes", "ostriches", "fish", "wolves", "donkeys"]
        );
    }
}
