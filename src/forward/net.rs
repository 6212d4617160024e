//! The real network: TCP.

use std::io;

use futures::{FutureExt as _, future::BoxFuture};
use tokio::net::{TcpListener, TcpStream};

use crate::ports::{BoxIo, Listen, Network};

/// TCP, with small writes sent at once.
#[derive(Clone, Copy, Debug, Default)]
pub struct TcpNetwork;

#[derive(Debug)]
struct TcpListen {
    listener: TcpListener,
    address: String,
}

impl Network for TcpNetwork {
    fn bind<'a>(&'a self, address: &'a str) -> BoxFuture<'a, io::Result<Box<dyn Listen>>> {
        async move {
            let listener = TcpListener::bind(address).await?;
            let address = listener.local_addr()?.to_string();
            Ok(Box::new(TcpListen { listener, address }) as Box<dyn Listen>)
        }
        .boxed()
    }

    fn connect<'a>(&'a self, address: &'a str) -> BoxFuture<'a, io::Result<BoxIo>> {
        async move {
            let stream = TcpStream::connect(address).await?;
            stream.set_nodelay(true)?;
            Ok(Box::new(stream) as BoxIo)
        }
        .boxed()
    }
}

impl Listen for TcpListen {
    fn accept(&mut self) -> BoxFuture<'_, io::Result<(BoxIo, String)>> {
        async move {
            let (stream, peer) = self.listener.accept().await?;
            stream.set_nodelay(true)?;
            Ok((Box::new(stream) as BoxIo, peer.to_string()))
        }
        .boxed()
    }

    fn address(&self) -> String {
        self.address.clone()
    }
}
