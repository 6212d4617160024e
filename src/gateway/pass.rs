//! One request's way to a copy and back.
//!
//! The rule of this module: a request is sent again only when no inference server can have begun it, to each copy
//! at most once unless its door did not hold it yet, within its deadline; and a client is told what the control plane knows
//! of a model that can't answer now.

use std::{
    sync::{Arc, Mutex, PoisonError, atomic::Ordering},
    time::Duration,
};

use http::{HeaderMap, HeaderName, HeaderValue, header::CONTENT_LENGTH, request::Parts};
use http_body::Body as _;
use tokio::time::timeout;

use super::{
    Gateway,
    epochs::Guard,
    health::Flight,
    listener::{Call, SELDON_MODEL},
    metrics::{Admitted, Class},
    passage::{Limit, Passage},
    pick::{Wish, pick},
    route::{Entry, Missing, Place, Share},
};
use crate::{
    domain::{
        error::Code,
        names::ModelName,
        near::nearest,
        outlier::Verdict,
        version::{Generation, Version},
    },
    forward::{
        Body, COPY, NOT_HERE, NOT_STARTED, RESIDENCY, Request, Response, UpstreamError, error_response,
        grpc::{Peeked, peek_model},
        headers::{grpc_timeout, strip_ending},
        replay::{Replay, SizeLimit},
        respond::too_large,
    },
    telemetry::trace::random_id,
};

/// Under which name the door is to serve the request.
const INTERNAL_MODEL: HeaderName = HeaderName::from_static("seldon-internal-model");
/// Which version answered; a client may send it back to get the same one again.
const SELDON_ROUTE: HeaderName = HeaderName::from_static("x-seldon-route");
const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// When to ask again where nothing better is known.
const SOON: Duration = Duration::from_secs(1);
/// The first wait for a copy that no door holds; it doubles.
const PAUSE: Duration = Duration::from_millis(5);
/// How long a door that could not be reached is chosen only when there is no other.
const SUSPICION: Duration = Duration::from_secs(3);

/// Why a request gets no answer from a copy.
struct Refused {
    code: Code,
    message: String,
    retry_after: Option<Duration>,
}

impl Refused {
    fn new(code: Code, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), retry_after: None }
    }

    const fn retry_after(mut self, after: Duration) -> Self {
        self.retry_after = Some(after);
        self
    }
}

/// The request as it is kept for another attempt.
struct Kept {
    head: Parts,
    /// `None` when there is no body.
    body: Option<Replay>,
}

/// An attempt's outcome that ends the request well.
struct Answer {
    response: Response,
    sticky: HeaderValue,
    flight: Flight,
}

/// The request's place in the counts of the copy that it is with: kept where it is found when the wait is over.
#[derive(Default)]
struct Aboard(Mutex<Option<Flight>>);

impl Aboard {
    fn board(&self, flight: Flight) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(flight);
    }

    fn leave(&self) -> Option<Flight> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

impl Gateway {
    /// Passes a request to a copy of the model that `call` names in `head`.
    pub(super) async fn pass(&self, head: Parts, call: Call<'_>, body: Body, mut admitted: Admitted) -> Response {
        let grpc = admitted.is_grpc();
        if let Some(length) = content_length(&head.headers)
            && length > self.options.body_limit
            && !(grpc && call.streaming)
        {
            admitted.ended(Class::ClientError);
            return too_large(grpc, self.options.body_limit);
        }
        let asked = grpc.then(|| grpc_timeout(&head.headers)).flatten().map(|given| (given, self.clock.now()));
        let own = if call.streaming { self.options.stream_idle } else { self.options.request_deadline };
        let deadline = asked.map_or(own, |(given, _)| given.min(self.options.stream_idle));
        let limit = if grpc && call.streaming {
            SizeLimit::per_message(self.options.body_limit)
        } else {
            SizeLimit::Total(self.options.body_limit)
        };
        let body = (!body.is_end_stream()).then(|| Replay::new(body, self.options.replay, limit));
        let mut kept = Kept { head, body };
        let id = self.prepare(&mut kept.head.headers, grpc);
        let streaming = call.streaming;
        let aboard = Aboard::default();
        let outcome = timeout(deadline, self.attempts(&kept, call, &aboard)).await;
        let outcome = match outcome {
            // Also when the inference server has words of its own for a body that was cut off.
            Ok(_) if kept.body.as_ref().is_some_and(Replay::over_limit) => {
                admitted.ended(Class::ClientError);
                return identified(too_large(grpc, self.options.body_limit), id);
            }
            Ok(outcome) => outcome,
            Err(_) => {
                self.metrics.deadline_exceeded.fetch_add(1, Ordering::Relaxed);
                if let Some(mut flight) = aboard.leave().filter(|_| asked.is_none()) {
                    flight.judged(Verdict::Error, &self.metrics, || self.clock.now());
                }
                Err(Refused::new(Code::DeadlineExceeded, format!("no answer came within {deadline:?}")))
            }
        };
        match outcome {
            Ok(Answer { mut response, sticky, flight }) => {
                if let Some(replay) = kept.body.take() {
                    replay.release();
                }
                let headers = response.headers_mut();
                strip_ending(headers);
                headers.insert(SELDON_ROUTE, sticky);
                let limit = match asked {
                    Some((given, at)) => Limit::deadline(given.saturating_sub(self.clock.now().since(at))),
                    None if streaming || grpc => Limit::silence(self.options.stream_idle),
                    None => Limit::silence(self.options.request_deadline),
                };
                let (parts, body) = response.into_parts();
                let body = Passage::body(body, &parts, admitted, flight, limit);
                identified(Response::from_parts(parts, body), id)
            }
            Err(refused) => {
                let response = error_response(grpc, refused.code, &refused.message, refused.retry_after);
                admitted.ended(if matches!(refused.code, Code::Invalid | Code::NotFound | Code::Unimplemented) {
                    Class::ClientError
                } else {
                    Class::ServerError
                });
                identified(response, id)
            }
        }
    }

    /// Makes the headers those of the next hop; answers the request's id.
    fn prepare(&self, headers: &mut HeaderMap, grpc: bool) -> HeaderValue {
        strip_ending(headers);
        if grpc && let Some(model) = headers.get_mut(SELDON_MODEL) {
            // Out of HTTP/2's table, like what the route says of the model.
            model.set_sensitive(true);
        }
        if let Some(id) = headers.get(REQUEST_ID) {
            return id.clone();
        }
        let id = random_id(&mut || self.random.next());
        headers.insert(REQUEST_ID, id.clone());
        id
    }

    async fn attempts(&self, kept: &Kept, call: Call<'_>, aboard: &Aboard) -> Result<Answer, Refused> {
        let peeked;
        let (name, version) = match (call.model, &kept.body) {
            (Some(name), _) => (name, call.version),
            (None, Some(body)) => {
                peeked = self.peek(body).await?;
                (peeked.0.as_str(), Some(peeked.1.as_str()).filter(|version| !version.is_empty()))
            }
            (None, None) => return Err(Refused::new(Code::Invalid, "the request has no message")),
        };
        let mut guard = Some(self.table.enter());
        let mut entry = self.routed(name)?;
        let sticky = kept.head.headers.get(SELDON_ROUTE).map(HeaderValue::as_bytes);
        let wish = Wish { version: version.map(|text| parse_version(&entry, text)).transpose()?, sticky };
        let mut tried: Vec<Generation> = Vec::new();
        let mut trouble = Trouble::default();
        let mut waited = Duration::ZERO;
        loop {
            let here = match guard.take() {
                Some(guard) => guard,
                None => {
                    let here = self.table.enter();
                    entry = self.routed(entry.model.as_str())?;
                    here
                }
            };
            let Some(picked) = pick(&entry, wish, &tried, &self.random, || self.clock.now()) else {
                drop(here);
                if tried.is_empty() {
                    return Err(self.absent(&entry, wish.version));
                }
                let left = self.options.route_wait.saturating_sub(waited);
                if !trouble.not_here.is_empty() && !left.is_zero() {
                    // A door does not hold the copy that the routes name. Newer routes are on their way; or the copy is, to where
                    // they have it already, as after a restart of all that there is.
                    let pause = waited.max(PAUSE).min(left);
                    waited += pause;
                    let newer = timeout(pause, self.table.next(&entry)).await.is_ok();
                    tried.retain(|copy| !newer && !trouble.not_here.contains(copy));
                    trouble.not_here.clear();
                    continue;
                }
                return trouble.end(&entry);
            };
            if !tried.is_empty() {
                self.metrics.retries.fetch_add(1, Ordering::Relaxed);
            }
            aboard.board(Flight::board(&entry, &picked));
            let (share, place) = (picked.share, picked.place);
            let Some(request) = attempt(kept, share, place, here) else {
                let message = "no copy could take the request, and too much of its body has been read to send it to \
                               another";
                return Err(Refused::new(Code::Unavailable, message).retry_after(SOON));
            };
            let answered = place.door.call(request).await;
            let Some(mut flight) = aboard.leave() else {
                return Err(Refused::new(Code::Unavailable, "the wait for the answer is over"));
            };
            match answered {
                Ok(response) => match self.refusal(&response) {
                    None => {
                        if response.headers().contains_key(RESIDENCY) {
                            place.pulse.resident.store(true, Ordering::Relaxed);
                        }
                        return Ok(Answer { response, sticky: share.sticky.clone(), flight });
                    }
                    Some(Refusal::NotHere) => trouble.not_here.push(place.generation),
                    Some(Refusal::NotStarted) => {
                        let flight = flight.refused();
                        trouble.refusal = Some(Answer { response, sticky: share.sticky.clone(), flight });
                    }
                },
                Err(error) if !error.started => self.unreachable(place, &error, &mut trouble),
                Err(UpstreamError { timed_out, message, .. }) => {
                    flight.judged(Verdict::Error, &self.metrics, || self.clock.now());
                    let code = if timed_out { Code::DeadlineExceeded } else { Code::Unavailable };
                    let message = format!("{message}; the inference server may have begun, so it was not sent again");
                    return Err(Refused::new(code, message));
                }
            }
            tried.push(place.generation);
        }
    }

    fn refusal(&self, response: &Response) -> Option<Refusal> {
        if response.headers().contains_key(NOT_HERE) {
            self.metrics.not_here.fetch_add(1, Ordering::Relaxed);
            return Some(Refusal::NotHere);
        }
        if response.headers().contains_key(NOT_STARTED) {
            self.metrics.not_started.fetch_add(1, Ordering::Relaxed);
            return Some(Refusal::NotStarted);
        }
        None
    }

    fn unreachable(&self, place: &Place, error: &UpstreamError, trouble: &mut Trouble) {
        self.metrics.unreachable.fetch_add(1, Ordering::Relaxed);
        let until = self.clock.now() + SUSPICION;
        place.pulse.suspect_until.store(until.as_micros(), Ordering::Relaxed);
        trouble.unreachable = Some(error.message.clone());
    }

    /// The model's name and version from the first message.
    async fn peek(&self, body: &Replay) -> Result<(String, String), Refused> {
        let most = self.options.replay;
        match body.peek(|bytes| peek_model(bytes, most)).await {
            Some(Peeked::Named { name, version }) => Ok((name, version)),
            Some(Peeked::Compressed) => Err(Refused::new(
                Code::Unimplemented,
                "the message is compressed, so the model's name can't be read; send it uncompressed",
            )),
            Some(Peeked::Malformed(why)) => Err(Refused::new(Code::Invalid, why)),
            None => Err(Refused::new(Code::Invalid, "the request ended before its message named a model")),
        }
    }

    fn routed(&self, name: &str) -> Result<Arc<Entry>, Refused> {
        self.table.find(name).map_err(|missing| self.missing(name, missing))
    }

    fn missing(&self, name: &str, missing: Missing) -> Refused {
        for (suffix, what) in [(".experiment", "experiments"), (".pipeline", "pipelines")] {
            if name.ends_with(suffix) {
                let name: String = name.chars().take(80).collect();
                return Refused::new(Code::NotFound, format!("{name:?} is not served: this gateway has no {what}"));
            }
        }
        if let Err(error) = ModelName::new(name) {
            return Refused::new(Code::Invalid, error.to_string());
        }
        if missing == Missing::NoTable {
            let message = "this gateway has no routes yet: it has not reached the scheduler since it started";
            return Refused::new(Code::Unavailable, message).retry_after(SOON);
        }
        self.metrics.unknown_model.fetch_add(1, Ordering::Relaxed);
        let hint = nearest(&self.table, name).map(|near| format!("; did you mean {near:?}?")).unwrap_or_default();
        Refused::new(Code::NotFound, format!("there is no model named {name:?}{hint}"))
    }

    fn absent(&self, entry: &Entry, version: Option<Version>) -> Refused {
        self.metrics.no_endpoint.fetch_add(1, Ordering::Relaxed);
        let absence = &entry.absence;
        let which = version.map(|version| format!(" version {version}")).unwrap_or_default();
        let mut message = format!("model {}{which} has no copy that can answer now", entry.model);
        for (before, text) in [("; it is ", &absence.state), (": ", &absence.reason)] {
            if !text.is_empty() {
                message += before;
                message += text;
            }
        }
        let after = absence.wait(self.clock.now(), SOON);
        Refused::new(Code::Unavailable, message).retry_after(after)
    }
}

/// A door's answer that lets the request go elsewhere.
enum Refusal {
    NotHere,
    NotStarted,
}

/// What went wrong on the way so far.
#[derive(Default)]
struct Trouble {
    /// Copies that their doors did not hold.
    not_here: Vec<Generation>,
    refusal: Option<Answer>,
    unreachable: Option<String>,
}

impl Trouble {
    /// The end of a request that no copy took: the words of a door, if one said why.
    fn end(self, entry: &Entry) -> Result<Answer, Refused> {
        if let Some(answer) = self.refusal {
            return Ok(answer);
        }
        let why = match self.unreachable {
            Some(why) => why,
            None => "no door that the routes name holds one, and neither it nor newer routes came".to_owned(),
        };
        let message = format!("no copy of model {} could be reached: {why}", entry.model);
        Err(Refused::new(Code::Unavailable, message).retry_after(SOON))
    }
}

/// The request as it goes to `place`, unless its body can't be read again.
fn attempt(kept: &Kept, share: &Share, place: &Place, guard: Guard) -> Option<Request> {
    let body = match &kept.body {
        Some(replay) => replay.reader()?.into(),
        None => Body::empty(),
    };
    let mut request = Request::from_parts(kept.head.clone(), body.with_ticket(guard));
    let headers = request.headers_mut();
    headers.insert(COPY, place.copy.clone());
    headers.insert(INTERNAL_MODEL, share.served.clone());
    Some(request)
}

fn parse_version(entry: &Arc<Entry>, text: &str) -> Result<Version, Refused> {
    let asked = text.parse().ok().map(Version);
    asked.filter(|version| entry.shares.iter().any(|share| share.version == *version)).ok_or_else(|| {
        let known: Vec<String> = entry.shares.iter().map(|share| share.version.to_string()).collect();
        let known = if known.is_empty() { "none".to_owned() } else { known.join(", ") };
        let asked: String = text.chars().take(20).collect();
        let message = format!("model {} has no version {asked:?} in service; in service: {known}", entry.model);
        Refused::new(Code::NotFound, message)
    })
}

fn identified(mut response: Response, id: HeaderValue) -> Response {
    response.headers_mut().insert(REQUEST_ID, id);
    response
}

fn content_length(headers: &HeaderMap) -> Option<u64> {
    headers.get(CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}
