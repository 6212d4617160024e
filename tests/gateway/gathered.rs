//! What many streams of one connection cost in system calls.

use std::{
    io::{self, IoSlice},
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll},
};

use futures::{FutureExt as _, future::BoxFuture};
use http_body_util::BodyExt as _;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    task::JoinSet,
    time::timeout,
};
use tokio_util::sync::CancellationToken;
use wharf::{
    forward::{ClientOptions, HttpUpstream, Limits, Request, TcpNetwork, Upstream as _, serve},
    ports::{BoxIo, Listen, Network, SystemClock},
};

use crate::harness::{Door, PATIENCE, grpc_message, grpc_post};

const STREAMS: usize = 30;

/// A network whose connections count what they write.
#[derive(Clone, Debug, Default)]
struct Counted(Arc<AtomicUsize>);

struct CountedIo {
    io: BoxIo,
    writes: Arc<AtomicUsize>,
}

#[derive(Debug)]
struct CountedListen {
    listener: Box<dyn Listen>,
    network: Counted,
}

impl Counted {
    fn io(&self, io: BoxIo) -> BoxIo {
        Box::new(CountedIo { io, writes: Arc::clone(&self.0) })
    }

    fn writes(&self) -> usize {
        self.0.swap(0, Ordering::Relaxed)
    }
}

impl Network for Counted {
    fn bind<'a>(&'a self, address: &'a str) -> BoxFuture<'a, io::Result<Box<dyn Listen>>> {
        async move {
            let listener = TcpNetwork.bind(address).await?;
            Ok(Box::new(CountedListen { listener, network: self.clone() }) as Box<dyn Listen>)
        }
        .boxed()
    }

    fn connect<'a>(&'a self, address: &'a str) -> BoxFuture<'a, io::Result<BoxIo>> {
        async move { Ok(self.io(TcpNetwork.connect(address).await?)) }.boxed()
    }
}

impl Listen for CountedListen {
    fn accept(&mut self) -> BoxFuture<'_, io::Result<(BoxIo, String)>> {
        async move {
            let (io, peer) = self.listener.accept().await?;
            Ok((self.network.io(io), peer))
        }
        .boxed()
    }

    fn address(&self) -> String {
        self.listener.address()
    }
}

impl AsyncRead for CountedIo {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_read(cx, into)
    }
}

impl AsyncWrite for CountedIo {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.writes.fetch_add(1, Ordering::Relaxed);
        Pin::new(&mut self.io).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.writes.fetch_add(1, Ordering::Relaxed);
        Pin::new(&mut self.io).poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

/// tokio's workers run who was woken last at once: the connection, after each stream that has a word for it, were it not for
/// its letting all of them go first.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn what_many_streams_say_at_once_goes_out_in_few_writes() {
    let (asking, answering) = (Counted::default(), Counted::default());
    let listener = answering.bind("127.0.0.1:0").await.expect("bound");
    let address = listener.address();
    let echo = Door::new(|request: Request| async move {
        let (head, body) = request.into_parts();
        let mut response = http::Response::new(body);
        response.headers_mut().extend(head.headers);
        Ok(response)
    });
    let shutdown = CancellationToken::new();
    let server = tokio::spawn(serve(listener, echo, Limits::default(), shutdown.clone()));
    let client =
        HttpUpstream::new(&address, Arc::new(asking.clone()), Arc::new(SystemClock::new()), ClientOptions::default());
    let client = Arc::new(client.expect("an address"));
    let call = |client: Arc<HttpUpstream>| async move {
        let response = client.call(grpc_post("ModelInfer", grpc_message("iris", "", 9))).await.expect("an answer");
        response.into_body().collect().await.expect("a body").to_bytes()
    };
    // Where both sides say what they are.
    let alone = timeout(PATIENCE, call(Arc::clone(&client))).await.expect("in time");
    asking.writes();
    answering.writes();

    let together = tokio::spawn(async move {
        let mut calls: JoinSet<_> = (0..STREAMS).map(|_| call(Arc::clone(&client))).collect();
        let mut answers = Vec::new();
        while let Some(answer) = calls.join_next().await {
            answers.push(answer.expect("it ends"));
        }
        answers
    });
    let answers = timeout(PATIENCE, together).await.expect("in time").expect("they end");
    assert_eq!(answers, vec![alone; STREAMS]);
    let (asking, answering) = (asking.writes(), answering.writes());
    // The heads, what they carry, and word of what was read.
    assert!(asking <= 8, "{asking} writes for {STREAMS} requests");
    assert!(answering <= 8, "{answering} writes for {STREAMS} answers");

    shutdown.cancel();
    timeout(PATIENCE, server).await.expect("in time").expect("it ends");
}
