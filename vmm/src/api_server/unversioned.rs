//! Paths without a version, as releases before version 1 had them: answered still, with the word that this ends.

use api::problem::{self, Problem};
use api::version;

use super::http::{Answer, Response};

/// What such a request for `path` is answered, where it comes to `answer` with a version.
pub fn answer(answer: Answer, path: &str) -> Answer {
    match answer {
        Answer::Now(response) => Answer::Now(announced(response, path)),
        Answer::Later(limit, mut later) => {
            let path = path.to_owned();
            Answer::Later(limit, Box::new(move |waited| Some(announced(later(waited)?, &path))))
        }
        // What answers it knows no headers of ours.
        answer @ Answer::HandOver(_) => answer,
    }
}

fn announced(response: Response, path: &str) -> Response {
    let mut response = response;
    if response.content_type == Some(problem::CONTENT_TYPE)
        && let Ok(problem) = serde_json::from_slice::<Problem>(&response.body)
    {
        response.content_type = Some("application/json");
        response.body = problem.to_unversioned_json();
    }
    response.headers.extend(version::announcement(path));
    response
}
