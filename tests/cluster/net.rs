//! The simulated network as the product's own ports.

use std::{fmt, io};

use futures::future::BoxFuture;
use wharf::ports::{BoxIo, Listen, Network};

/// turmoil's network, from inside a simulated host.
#[derive(Debug)]
pub(crate) struct Simulated;

struct SimulatedListen(turmoil::net::TcpListener);

impl fmt::Debug for SimulatedListen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SimulatedListen")
    }
}

impl Network for Simulated {
    fn bind<'a>(&'a self, address: &'a str) -> BoxFuture<'a, io::Result<Box<dyn Listen>>> {
        Box::pin(async move {
            let listener = turmoil::net::TcpListener::bind(address).await?;
            Ok(Box::new(SimulatedListen(listener)) as Box<dyn Listen>)
        })
    }

    fn connect<'a>(&'a self, address: &'a str) -> BoxFuture<'a, io::Result<BoxIo>> {
        Box::pin(async move { Ok(Box::new(turmoil::net::TcpStream::connect(address).await?) as BoxIo) })
    }
}

impl Listen for SimulatedListen {
    fn accept(&mut self) -> BoxFuture<'_, io::Result<(BoxIo, String)>> {
        Box::pin(async move {
            let (stream, peer) = self.0.accept().await?;
            Ok((Box::new(stream) as BoxIo, peer.to_string()))
        })
    }

    fn address(&self) -> String {
        self.0.local_addr().map(|address| address.to_string()).unwrap_or_default()
    }
}
