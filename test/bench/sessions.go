package main

import (
	"bufio"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"masquevpn/client"
	"masquevpn/internal/config"
	"masquevpn/internal/lab"
	"masquevpn/routing"
	"masquevpn/tun/tuntest"
)

const (
	atOnce     = 32              // simultaneous connection attempts
	idleSettle = 5 * time.Second // time until sessions count as idle
	firstCount = 100             // number of sessions
	fullCount  = 1000
)

// sessions is a program that connects many clients without devices. Its
// arguments are a client's configuration and counts of clients. At each count
// it prints the time in seconds, and continues after it has read a line.
func sessions(ctx context.Context, args []string) error {
	if len(args) < 2 {
		return errors.New("want a configuration and numbers of clients")
	}
	base, err := clientConfig(args[0])
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	var running sync.WaitGroup
	defer running.Wait()
	defer cancel()
	next := bufio.NewReader(os.Stdin)
	up := 0
	for _, arg := range args[1:] {
		count, err := strconv.Atoi(arg)
		if err != nil {
			return err
		}
		start := time.Now()
		g, gctx := errgroup.WithContext(ctx)
		g.SetLimit(atOnce)
		for ; up < count; up++ {
			g.Go(func() error {
				return connect(gctx, base, func(run func(context.Context)) {
					running.Go(func() { run(ctx) })
				})
			})
		}
		if err := g.Wait(); err != nil {
			return err
		}
		fmt.Println(time.Since(start).Seconds())
		if _, err := next.ReadString('\n'); err != nil {
			return err
		}
	}
	return nil
}

// connect starts a client and waits until it is connected.
func connect(ctx context.Context, cfg client.Config, start func(func(context.Context))) error {
	cfg.OpenDevice = func() (client.Device, error) { return tuntest.New(1400), nil }
	cfg.OpenNetwork = func(client.Device) (client.Network, error) { return noNetwork{}, nil }
	c, err := client.New(cfg)
	if err != nil {
		return err
	}
	ended := make(chan error, 1)
	start(func(ctx context.Context) { ended <- c.Run(ctx) })
	for {
		changed := c.Changed()
		if c.Status().State == client.StateConnected {
			return nil
		}
		select {
		case <-changed:
		case err := <-ended:
			return fmt.Errorf("a client ended: %w", err)
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// noNetwork accepts a network configuration and applies nothing to the host.
type noNetwork struct{}

func (noNetwork) Apply(routing.State) error { return nil }
func (noNetwork) Maintain(ctx context.Context, _ func(routing.Health)) error {
	<-ctx.Done()
	return nil
}
func (noNetwork) FollowHost() ([]string, error) { return nil, nil }
func (noNetwork) Held() error                   { return nil }
func (noNetwork) Close() error                  { return nil }

// clientConfig reads the output of `masque-proxy invite`.
func clientConfig(file string) (cfg client.Config, err error) {
	data, err := os.ReadFile(file)
	if err != nil {
		return cfg, err
	}
	f, err := config.ParseClient(file, data)
	if err != nil {
		return cfg, err
	}
	cert, err := tls.X509KeyPair([]byte(f.CertPEM), []byte(f.KeyPEM))
	if err != nil {
		return cfg, err
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM([]byte(f.CAPEM)) {
		return cfg, fmt.Errorf("%s: no certificate in tls.ca_pem", file)
	}
	return client.Config{
		Name: "bench", Proxy: f.Proxy,
		TLS: &tls.Config{RootCAs: roots, Certificates: []tls.Certificate{cert}}, Token: f.Token,
		Request: f.Request,
	}, nil
}

// manySessions measures the memory of the proxy with idle sessions, and the
// rate at which they connect.
func manySessions(ctx context.Context, t *tunnel, _ time.Duration) (values []value, err error) {
	if err := t.kind.proxy(ctx, t); err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, stop(ctx, t.proxy)) }()
	start, err := memory(t.proxy)
	if err != nil {
		return nil, err
	}
	values = append(values, value{"proxy's memory, start", "MB", start / 1e6})
	self, err := os.Executable()
	if err != nil {
		return values, err
	}
	// Pass files rather than readers and writers: with those, Wait would also
	// wait for this side to close them.
	in, feed, err := os.Pipe()
	if err != nil {
		return values, err
	}
	defer feed.Close()
	lines, out, err := os.Pipe()
	if err != nil {
		return values, errors.Join(err, in.Close())
	}
	defer lines.Close()
	c := t.Client.Command(ctx, self, "sessions", t.clientFile(), strconv.Itoa(firstCount),
		strconv.Itoa(fullCount))
	c.Stdin, c.Stdout = in, out
	err = c.Start()
	if err = errors.Join(err, in.Close(), out.Close()); err != nil {
		return values, err
	}
	used := make(map[int]float64)
	for s, count := bufio.NewScanner(lines),
		firstCount; count <= fullCount; count = count * fullCount / firstCount {
		if !s.Scan() {
			return values, fmt.Errorf("%d sessions: %w\n%s", count, c.Wait(), logOf(c))
		}
		seconds, err := strconv.ParseFloat(s.Text(), 64)
		if err != nil {
			return values, err
		}
		if err := sleep(ctx, idleSettle); err != nil {
			return values, err
		}
		if used[count], err = memory(t.proxy); err != nil {
			return values, err
		}
		values = append(values, value{fmt.Sprintf("proxy's memory, %d sessions", count), "MB",
			used[count] / 1e6})
		if count == fullCount {
			values = append(values,
				value{"memory per idle session", "KB",
					(used[fullCount] - used[firstCount]) / (fullCount - firstCount) / 1e3},
				value{"sessions set up", "1/s", (fullCount - firstCount) / seconds})
		}
		if _, err := io.WriteString(feed, "\n"); err != nil {
			return values, err
		}
	}
	return values, c.Wait()
}

// stop ends a program and ignores its exit status.
func stop(ctx context.Context, c *lab.Cmd) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	c.Stop(ctx)
	<-c.Done()
	return ctx.Err()
}
