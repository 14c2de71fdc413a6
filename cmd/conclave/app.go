package main

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/spf13/cobra"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/client"
)

// app holds the flags that all commands share.
type app struct {
	addr, cacert, cert, key string
	output                  string
	timeout                 time.Duration
	local                   bool
}

func (a *app) flags(root *cobra.Command) {
	f := root.PersistentFlags()
	f.StringVar(&a.addr, "addr", "", "https `URLS` of nodes, comma-separated (CONCLAVE_ADDR)")
	f.StringVar(&a.cacert, "cacert", "", "`FILE` with the sites' CA certificates, PEM (CONCLAVE_CACERT)")
	f.StringVar(&a.cert, "cert", "", "`FILE` with the client certificate, PEM (CONCLAVE_CLIENT_CERT or CONCLAVE_ADMIN_CERT)")
	f.StringVar(&a.key, "key-file", "", "`FILE` with the client certificate's key, PEM (CONCLAVE_CLIENT_KEY or CONCLAVE_ADMIN_KEY)")
	f.StringVarP(&a.output, "output", "o", "table", "output `FORMAT`: table or json")
	f.BoolVar(&a.local, "local", false, "show what the node itself knows, even if it is cut off and that is outdated")
	f.DurationVar(&a.timeout, "timeout", 30*time.Second, "longest wait for one request")
	root.PersistentPreRunE = func(*cobra.Command, []string) error {
		if a.output != "table" && a.output != "json" {
			return usagef("--output %q is not table or json", a.output)
		}
		return nil
	}
	_ = root.RegisterFlagCompletionFunc("output", cobra.FixedCompletions([]string{"table", "json"}, cobra.ShellCompDirectiveNoFileComp))
}

// service connects as the service identity, operator as the administrator.
func (a *app) service() (*client.Client, error) {
	return a.connect("CONCLAVE_CLIENT_CERT", "CONCLAVE_CLIENT_KEY")
}

func (a *app) operator() (*client.Client, error) {
	if os.Getenv("CONCLAVE_ADMIN_CERT") == "" {
		return a.service()
	}
	return a.connect("CONCLAVE_ADMIN_CERT", "CONCLAVE_ADMIN_KEY")
}

func (a *app) connect(certEnv, keyEnv string) (*client.Client, error) {
	cert, key := or(a.cert, os.Getenv(certEnv)), or(a.key, os.Getenv(keyEnv))
	tlsConfig, err := client.LoadTLS(or(a.cacert, os.Getenv("CONCLAVE_CACERT")), cert, key)
	if err != nil {
		return nil, err
	}
	var addresses []string
	for _, s := range strings.Split(or(a.addr, os.Getenv("CONCLAVE_ADDR")), ",") {
		if s = strings.TrimSpace(s); s != "" {
			addresses = append(addresses, s)
		}
	}
	return client.New(client.Config{Addresses: addresses, TLS: tlsConfig, Timeout: a.timeout, Local: a.local})
}

func or(s, fallback string) string {
	if s != "" {
		return s
	}
	return fallback
}

// show prints v as JSON or by the table function.
func (a *app) show(cmd *cobra.Command, v any, table func(w io.Writer)) error {
	w := cmd.OutOrStdout()
	if a.output == "json" {
		enc := json.NewEncoder(w)
		enc.SetIndent("", "  ")
		enc.SetEscapeHTML(false)
		return enc.Encode(v)
	}
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	table(t)
	return t.Flush()
}

func row(w io.Writer, cells ...any) {
	for i, c := range cells {
		if i > 0 {
			fmt.Fprint(w, "\t")
		}
		fmt.Fprint(w, visible(fmt.Sprint(c)))
	}
	fmt.Fprintln(w)
}

// visible returns s with everything that does not show as text on one line
// written as an escape: what a node sends must not move the cursor over what a
// custodian has read, nor begin a line of its own.
func visible(s string) string {
	shows := func(r rune) bool { return r != utf8.RuneError && unicode.IsGraphic(r) }
	if !strings.ContainsFunc(s, func(r rune) bool { return !shows(r) }) {
		return s
	}
	var b strings.Builder
	for i, r := range s {
		if shows(r) {
			b.WriteRune(r)
			continue
		}
		if r == utf8.RuneError {
			fmt.Fprintf(&b, "\\x%02x", s[i])
			continue
		}
		q := strconv.QuoteRune(r)
		b.WriteString(q[1 : len(q)-1])
	}
	return b.String()
}

// when prints an instant for a person.
func when(t time.Time) string {
	if t.IsZero() {
		return "-"
	}
	return t.UTC().Format("2006-01-02 15:04:05Z")
}

// input reads a value given on the command line: "@FILE" is the file's content,
// "-" standard input, anything else itself.
func input(cmd *cobra.Command, arg string) ([]byte, error) {
	switch {
	case arg == "-":
		return io.ReadAll(cmd.InOrStdin())
	case strings.HasPrefix(arg, "@"):
		return os.ReadFile(arg[1:])
	}
	return []byte(arg), nil
}

// contextPairs is the value of --context NAME=VALUE, which may be repeated.
type contextPairs map[string]string

func (p contextPairs) String() string { return "" }
func (p contextPairs) Type() string   { return "NAME=VALUE" }

func (p contextPairs) Set(s string) error {
	name, value, ok := strings.Cut(s, "=")
	if !ok || name == "" {
		return fmt.Errorf("%q is not NAME=VALUE", s)
	}
	if _, twice := p[name]; twice {
		return fmt.Errorf("%s is given twice", name)
	}
	p[name] = value
	return nil
}

// ask shows a table and the question on standard error and reads the answer; without
// a yes nothing is done.
func (a *app) ask(cmd *cobra.Command, table func(io.Writer), question, undone string) error {
	t := tabwriter.NewWriter(cmd.ErrOrStderr(), 0, 0, 2, ' ', 0)
	table(t)
	if err := t.Flush(); err != nil {
		return err
	}
	fmt.Fprintf(cmd.ErrOrStderr(), "\n%s Type yes: ", question)
	var answer string
	if _, err := fmt.Fscanln(cmd.InOrStdin(), &answer); err != nil || answer != "yes" {
		return usagef("%s; answer yes, or give --yes", undone)
	}
	return nil
}

// keyPath splits the argument KEYRING/KEY, which has been checked.
func keyPath(arg string) (keyring, key string) {
	keyring, key, _ = kms.SplitKeyPath(arg)
	return keyring, key
}

// arguments demands the arguments that are named, those in brackets being
// optional, and well-formed names of keys and keyrings.
func arguments(names string) cobra.PositionalArgs {
	all := strings.Fields(names)
	optional := strings.Count(names, "[")
	return func(cmd *cobra.Command, args []string) error {
		if len(args) > len(all) || len(args) < len(all)-optional {
			return usagef("%s takes %s; see: %s --help", cmd.CommandPath(), or(names, "no arguments"), cmd.CommandPath())
		}
		for i, arg := range args {
			var err error
			switch all[i] {
			case "KEYRING/KEY":
				_, _, err = kms.SplitKeyPath(arg)
			case "KEYRING":
				err = kms.CheckName("keyring", arg)
			}
			if err != nil {
				return usageError{err}
			}
		}
		return nil
	}
}
