// Package proxy is a CONNECT-IP proxy (RFC 9484): an HTTP/3 server that
// authenticates clients, assigns addresses to them, advertises routes and
// forwards their packets through one TUN device. It also proxies UDP (RFC 9298)
// if the configuration allows it.
//
// # Running a proxy
//
// Fill in a [Config], make a [Server] with [New] and call [Server.Run]. Run
// needs CAP_NET_ADMIN: it opens a TUN device, and adds addresses, routes and
// firewall rules to the network namespace of the calling thread. It serves
// until its context is done; then it ends all sessions, removes everything it
// added to the host, and returns nil. [Server.Ready] is closed when clients can
// connect.
//
// A Server runs once. To start again, make another one.
//
// # What the program provides
//
// Config.TLS has the certificate of the proxy, and the authorities of clients
// for [MethodMTLS]. To renew the certificate without a restart, set
// tls.Config.GetCertificate.
//
// The program implements [Users], which finds users by name and by token. When
// users change, call [Server.UsersChanged]: it ends the sessions of users who
// are gone or have new credentials, and gives the others their new rates and
// routes. With [MethodNone] there are no users.
//
// A program without privileges, such as a test, replaces the device and the
// configuration of the kernel by Config.OpenDevice and Config.OpenNetwork. The
// device of package tuntest works in memory.
//
// # Sessions
//
// Each accepted request is a session: a tunnel for IP packets ([KindIP]) or a
// flow of UDP packets to one target ([KindUDP]). A tunnel has leased addresses,
// the routes that were advertised to its client, and DNS settings. A client
// that reconnects replaces its previous session and keeps its addresses.
// [Server.Sessions] describes the running sessions, and [Server.Kick] ends one.
//
// A client whose user has a [Site] is a gateway: it may advertise the networks
// behind it and assign addresses to the proxy (RFC 9484 section 8.2). The
// networks become routes of the proxy's host and are advertised to other sites.
//
// # Changing the configuration
//
// [Server.Reload] applies another Config while the proxy runs, and returns the
// configuration keys that need a restart. Sessions continue unless the new
// Config forbids them.
// [Server.SetDNS] changes the DNS settings alone.
//
// # Status and health
//
// [Server.Status] and [Server.Counters] describe the proxy for people and for
// metrics. [Server.Problem] returns a sentence for the operator if the host
// does not keep the configuration that clients need, for example because
// another program removes rules. [Server.Stuck] returns an error if packets do
// not move because of a fault of the proxy, so that a supervisor can restart
// it.
//
// # Errors
//
// An error of New, Reload or SetDNS is an *[Error], and so is an error of Run
// if the proxy cannot start for a known reason. Its Kind tells a wrong
// configuration ([KindUsage]), missing privileges ([KindPrivileges]) and other
// failures ([KindFailure]) apart. Key names the configuration key that is
// wrong, and Remedy says what to do. A request or a session that fails does not
// end the proxy: the reason is in the log, and the client gets a status code
// with a Proxy-Status field (RFC 9209).
package proxy
