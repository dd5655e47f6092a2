use std::fs;
use std::time::Duration;

use super::*;
use crate::settings::{Settings, Token};
use crate::testing::{Answer, Request, Server};

const BODY: &[u8] = b"0123456789abcdefghijklmnopqrstuvwxyz";

struct Fixture {
    folder: tempfile::TempDir,
    server: Server,
}

impl Fixture {
    fn new(answer: impl Fn(&Request) -> Answer + Send + Sync + 'static) -> Self {
        Fixture { folder: tempfile::tempdir().unwrap(), server: Server::start(answer) }
    }

    fn remote(&self) -> Remote {
        Remote::new(Settings {
            endpoint: "https://hub.invalid".into(),
            token: Some(Token("hidden-token".into())),
            offline: false,
            hub: self.folder.path().join("hub"),
            own: self.folder.path().join("own"),
            backoff: Duration::ZERO,
        })
    }

    fn file(&self) -> WebFile {
        let digest = FileDigest::Blake3(blake3::hash(BODY).to_hex().to_string());
        WebFile { url: format!("{}/file?key=hidden-key", self.server.url), digest }
    }

    fn fetch(&self) -> Result<Vec<u8>, String> {
        let fetched = self.remote().fetch_web(&self.file(), &mut |_, _| {});
        let text = fetched.map(|path| fs::read(path).unwrap()).map_err(|error| format!("{error:#}"));
        assert!(!text.as_ref().is_err_and(|text| text.contains("hidden")), "{text:?}");
        text
    }

    fn partial(&self) -> std::path::PathBuf {
        let FileDigest::Blake3(digits) = self.file().digest else { unreachable!("as made above") };
        self.folder.path().join(format!("own/web/blake3-{digits}.incomplete"))
    }

    /// The first bytes that were asked for.
    fn ranges(&self) -> Vec<usize> {
        self.server.requests().iter().map(Request::from).collect()
    }
}

#[test]
fn a_file_is_fetched_once_and_the_token_goes_to_the_hub_alone() {
    let fixture = Fixture::new(|request| Answer::file(request, BODY));
    assert_eq!(fixture.fetch().unwrap(), BODY);
    assert_eq!(fixture.fetch().unwrap(), BODY);
    let requests = fixture.server.requests();
    assert_eq!(requests.len(), 1, "{requests:?}");
    assert!(!requests[0].headers.contains_key("authorization"), "{requests:?}");
}

#[test]
fn a_file_in_the_cache_that_was_damaged_is_fetched_again() {
    let fixture = Fixture::new(|request| Answer::file(request, BODY));
    fixture.fetch().unwrap();
    fs::write(fixture.partial().with_extension(""), "damaged").unwrap();
    assert_eq!(fixture.fetch().unwrap(), BODY);
    assert_eq!(fixture.server.requests().len(), 2);
}

#[test]
fn a_connection_that_is_cut_goes_on_where_it_was() {
    let fixture =
        Fixture::new(|request| Answer { cut: Some(5.min(BODY.len() - request.from())), ..Answer::file(request, BODY) });
    assert_eq!(fixture.fetch().unwrap(), BODY);
    // More cuts than tries: what gains ground goes on.
    assert_eq!(fixture.ranges(), [0, 5, 10, 15, 20, 25, 30, 35]);
}

#[test]
fn a_later_process_goes_on_with_what_is_there() {
    let fixture = Fixture::new(|request| match request.before {
        0 => Answer { cut: Some(7), ..Answer::file(request, BODY) },
        1..=5 => Answer::status(500),
        _ => Answer::file(request, BODY),
    });
    let error = fixture.fetch().unwrap_err();
    assert!(
        error.contains("answers with 500, 5 times in a row; 7 B are kept, and the same command goes on"),
        "{error}"
    );
    assert_eq!(fs::read(fixture.partial()).unwrap(), &BODY[..7]);
    assert_eq!(fixture.fetch().unwrap(), BODY);
    assert!(!fixture.partial().exists());
}

#[test]
fn a_server_that_cannot_go_on_begins_again() {
    let fixture = Fixture::new(|request| {
        let whole = Answer { body: BODY.to_vec(), ..Answer::status(200) };
        if request.before == 0 { Answer { cut: Some(9), ..whole } } else { whole }
    });
    assert_eq!(fixture.fetch().unwrap(), BODY);
    assert_eq!(fixture.ranges(), [0, 9]);
}

#[test]
fn what_is_left_of_another_file_is_not_trusted() {
    let fixture = Fixture::new(|request| Answer::file(request, BODY));
    fs::create_dir_all(fixture.partial().parent().unwrap()).unwrap();
    for left in [&b"other"[..], &[b'x'; 36], &[b'x'; 50]] {
        fs::write(fixture.partial(), left).unwrap();
        assert_eq!(fixture.fetch().unwrap(), BODY);
        fs::remove_file(fixture.partial().with_extension("")).unwrap();
    }
}

#[test]
fn a_wrong_digest_shows_both_and_leaves_nothing() {
    let fixture = Fixture::new(|request| Answer::file(request, b"something else"));
    let error = fixture.fetch().unwrap_err();
    for digest in [blake3::hash(BODY), blake3::hash(b"something else")] {
        assert!(error.contains(&digest.to_hex().to_string()), "{error}");
    }
    assert!(error.contains("/file`: what came is not what was asked for: its BLAKE3 is"), "{error}");
    assert!(!fixture.partial().exists() && !fixture.partial().with_extension("").exists());
}

#[test]
fn a_wrong_length_is_noticed() {
    // Longer than what comes: the connection ends too early, each time.
    let fixture = Fixture::new(|request| Answer { length: Some(100 - request.from()), ..Answer::file(request, BODY) });
    // The whole file is there then, and its digest says so.
    assert_eq!(fixture.fetch().unwrap(), BODY);
    assert_eq!(fixture.ranges(), [0, 36]);
    let fixture = Fixture::new(|_| Answer { length: Some(100), body: BODY.to_vec(), ..Answer::status(200) });
    let error = fixture.fetch().unwrap_err();
    assert!(error.contains("after 36") && error.contains("5 times in a row"), "{error}");
    // Shorter: what is missing is not in the digest.
    let fixture = Fixture::new(|_| Answer { length: Some(10), body: BODY.to_vec(), ..Answer::status(200) });
    assert!(fixture.fetch().unwrap_err().contains("what came is not what was asked for"));
}

#[test]
fn redirects_are_followed_so_far_and_no_further() {
    let fixture = Fixture::new(|request| match request.path.as_str() {
        "/file?key=hidden-key" => Answer::redirect("next"),
        "/next" => Answer::redirect("/last?signature=hidden-signature"),
        _ => Answer::file(request, BODY),
    });
    assert_eq!(fixture.fetch().unwrap(), BODY);
    assert_eq!(fixture.server.log()[1..], ["GET /next", "GET /last?signature=hidden-signature"]);
    let refused =
        |to: fn(&Request) -> String| Fixture::new(move |request| Answer::redirect(&to(request))).fetch().unwrap_err();
    assert!(refused(|_| "/file?key=hidden-key".into()).contains("redirects in a circle"));
    assert!(refused(|request| format!("{}x", request.path)).contains("redirects more than 8 times"));
    assert!(refused(|_| "http://example.org/hidden".into()).contains("not encrypted"));
    assert!(refused(|_| "ftp://example.org/hidden".into()).contains("to nowhere"));
}

#[test]
fn a_busy_server_is_asked_again_when_it_says() {
    let fixture = Fixture::new(|request| match request.before {
        0 => Answer::status(429).with("Retry-After", "0"),
        1 => Answer::status(503),
        _ => Answer::file(request, BODY),
    });
    assert_eq!(fixture.fetch().unwrap(), BODY);
    let fixture = Fixture::new(|_| Answer::status(429).with("Retry-After", "3600"));
    let error = fixture.fetch().unwrap_err();
    assert!(error.contains("asked too often, and wants to be left alone for 3600 seconds"), "{error}");
    for status in [400, 404, 410] {
        let fixture = Fixture::new(move |_| Answer::status(status));
        assert!(fixture.fetch().unwrap_err().contains(&format!("answers with {status}")));
        assert_eq!(fixture.server.requests().len(), 1);
    }
}

#[test]
fn a_server_that_is_not_there_is_named() {
    let fixture = Fixture::new(|_| Answer::status(500));
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let file = WebFile { url: format!("http://127.0.0.1:{port}/x?hidden"), ..fixture.file() };
    let error = format!("{:#}", fixture.remote().fetch_web(&file, &mut |_, _| {}).unwrap_err());
    assert!(error.contains(&format!("`127.0.0.1:{port}` cannot be reached")) && !error.contains("hidden"), "{error}");
}
